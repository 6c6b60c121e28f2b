"""W&B sees what the run folder holds, and never decides whether a run succeeds."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from moeless.tracking import read_manifest, start_run
from moeless.tracking.wandb import choose_mode


class StandInRun:
    """Records what a W&B run is told."""

    def __init__(self, offline: bool = False) -> None:
        self.offline = offline
        self.rows: list[dict] = []
        self.used: list[object] = []
        self.logged: list[object] = []
        self.exit_code: int | None = None

    def log(self, row: dict) -> None:
        self.rows.append(row)

    def use_artifact(self, artifact: object) -> None:
        self.used.append(artifact)

    def log_artifact(self, artifact: object) -> None:
        self.logged.append(artifact)

    def _log_artifact(self, artifact: object, *, is_user_created: bool, use_after_commit: bool) -> None:
        """What W&B's own ``use_artifact`` calls; the public call refuses to work offline."""
        assert self.offline
        assert is_user_created
        assert use_after_commit
        self.used.append(artifact)

    def finish(self, exit_code: int = 0) -> None:
        self.exit_code = exit_code


class StandInArtifact:
    def __init__(self, name: str, type: str, metadata: dict) -> None:
        self.name, self.type, self.metadata = name, type, metadata
        self.files: list[str] = []

    def add_file(self, path: str, name: str, policy: str) -> None:
        assert policy == "immutable"
        self.files.append(name)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandInRun:
    """A module that stands for ``wandb``, with one run."""
    run = StandInRun()
    module = types.ModuleType("wandb")
    # libraries ask whether W&B is installed
    module.__spec__ = ModuleSpec("wandb", None)
    module.calls = []

    def init(**options):
        module.calls.append(options)
        return run

    module.init = init
    module.Settings = lambda **values: types.SimpleNamespace(**values)
    module.Artifact = StandInArtifact
    module.Table = lambda columns, data: {"columns": columns, "data": data}
    module.Image = lambda path, caption: {"path": path, "caption": caption}
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", "online")
    return run


def _trace(folder: Path) -> Path:
    folder.mkdir()
    (folder / "trace.json").write_text("{}")
    return folder


def test_config_metrics_tables_and_artifacts_reach_wandb(tmp_path: Path, stand_in: StandInRun) -> None:
    trace = _trace(tmp_path / "trace")
    with start_run("serve-bench", "x", {"rate": 1}, 3, [trace], tmp_path / "run") as run:
        run.log({"layer_ms": 1.0})
        cell = {"policy": "static", "layer": {"mean_ms": 2.0}, "request": None, "warnings": []}
        run.write_result({"schema_version": 1, "command": "serve-bench", "cells": [cell]})
    options = sys.modules["wandb"].calls[0]
    assert options["mode"] == "online"
    assert options["config"]["seed"] == 3
    assert stand_in.rows[0] == {"layer_ms": 1.0}
    assert stand_in.rows[1]["result"] == {
        "columns": ["layer.mean_ms", "policy", "request"],
        "data": [["2.0", "static", None]],
    }
    assert [artifact.type for artifact in stand_in.used] == ["trace"]
    assert [artifact.type for artifact in stand_in.logged] == ["result"]
    assert stand_in.exit_code == 0


def test_a_trace_is_one_artifact_in_the_run_that_makes_it_and_the_run_that_reads_it(
    tmp_path: Path, stand_in: StandInRun
) -> None:
    with start_run("trace", "x", {}, 0, [], tmp_path / "first") as run:
        trace = _trace(tmp_path / "trace")
        run.produced(trace)
    with start_run("serve-bench", "x", {}, 0, [trace], tmp_path / "second"):
        pass
    assert stand_in.logged[0].name == stand_in.used[0].name
    assert stand_in.logged[0].metadata["sha256"] == stand_in.used[0].metadata["sha256"]
    assert stand_in.logged[0].files == stand_in.used[0].files == ["trace.json"]


def test_lineage_is_recorded_offline_too(tmp_path: Path, stand_in: StandInRun) -> None:
    stand_in.offline = True
    with start_run("serve-bench", "x", {}, 0, [_trace(tmp_path / "trace")], tmp_path / "run"):
        pass
    assert [artifact.type for artifact in stand_in.used] == ["trace"]


def test_a_figure_and_a_table_reach_wandb(tmp_path: Path, stand_in: StandInRun) -> None:
    from moeless.report import routing_figures

    with start_run("reproduce", "x", {}, 0, [], tmp_path / "run") as run:
        run.figure("loads", routing_figures.popularity([[1, 2], [3, 4]]), "Loads", "caption")
        run.table("claims", ["claim", "ours"], [["time", None]])
    assert stand_in.rows[0]["figures/loads"]["caption"] == "Loads"
    assert stand_in.rows[0]["figures/loads"]["path"].endswith("loads.png")
    assert stand_in.rows[1] == {"claims": {"columns": ["claim", "ours"], "data": [["time", None]]}}


def test_a_failed_run_is_marked_failed_in_wandb(tmp_path: Path, stand_in: StandInRun) -> None:
    with pytest.raises(ValueError), start_run("demo", "x", {}, 0, [], tmp_path / "run"):
        raise ValueError("boom")
    assert stand_in.exit_code == 1


@pytest.mark.parametrize("broken", ["log", "log_artifact", "finish"])
def test_a_run_survives_whatever_wandb_raises(
    tmp_path: Path, stand_in: StandInRun, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(stand_in, broken, fail)
    with start_run("demo", "x", {}, 0, [], tmp_path / "run") as run:
        run.log({"a": 1})
        run.log({"a": 2})
        run.write_result({"cells": []})
    manifest = read_manifest(tmp_path / "run")
    assert manifest["status"] == "ok"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert sum("no route to host" in warning for warning in manifest["warnings"]) == 1


def test_a_run_survives_without_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with start_run("demo", "x", {}, 0, [], tmp_path / "run", wandb=True) as run:
        run.log({"a": 1})
    manifest = read_manifest(tmp_path / "run")
    assert manifest["status"] == "ok"
    assert "W&B could not start" in manifest["warnings"][0]


def test_no_wandb_never_imports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with start_run("demo", "x", {}, 0, [], tmp_path / "run", wandb=False):
        pass
    assert read_manifest(tmp_path / "run")["warnings"] == []


@pytest.mark.parametrize(
    ("environment", "wanted", "mode"),
    [
        ({}, None, "offline"),
        ({}, True, "offline"),
        ({"WANDB_API_KEY": "k"}, None, "online"),
        ({"WANDB_API_KEY": "k"}, False, "disabled"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, True, "offline"),
        ({"WANDB_MODE": "disabled"}, None, "disabled"),
        ({"WANDB_MODE": "disabled"}, True, "offline"),
    ],
)
def test_offline_unless_logged_in_or_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict, wanted: bool | None, mode: str
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choose_mode(wanted) == mode


def test_a_stored_login_means_online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert choose_mode(None) == "online"


def test_the_commands_that_make_artefacts_log_them_under_the_names_that_their_readers_use(
    tmp_path: Path, stand_in: StandInRun, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ("trace", "bundled", "bundled", "--max-requests", 4, "--max-new-tokens", 2, "--out", "trace", "--wandb"),
        ("plan", "trace", "--planner", "eplb", "--cluster", "cpu8", "--out", "plan.json", "--wandb"),
        ("train-predictor", "trace", "--method", "frequency", "--out", "fitted", "--wandb"),
        ("plan", "trace", "--cluster", "cpu8", "--out", "silent.json", "--no-wandb"),
    ):
        status, _, error = cli(*arguments)
        assert status == 0, error
    assert [artifact.type for artifact in stand_in.logged] == ["trace", "plan", "predictor"]
    assert {artifact.name for artifact in stand_in.used} == {stand_in.logged[0].name}
    assert stand_in.logged[1].files == ["plan.json"]
    assert len(list((tmp_path / "results" / "runs").iterdir())) == 3


def test_an_imported_trace_is_logged_and_a_failing_mirror_costs_nothing(
    tmp_path: Path, stand_in: StandInRun, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "routing.csv").write_text("layer,token,experts\n0,0,1 2\n0,1,0 3\n")
    shapes = ("--layers", 1, "--experts", 4, "--top-k", 2)
    command = ("import-trace", "routing.csv", "--from", "csv", *shapes, "--wandb", "--out")
    assert cli(*command, "first")[0] == 0
    assert [artifact.type for artifact in stand_in.logged] == ["trace"]

    def fail(*_: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(stand_in, "log_artifact", fail)
    status, _, error = cli(*command, "second")
    assert status == 0, error
    assert (tmp_path / "second" / "trace.json").is_file()
    last = sorted((tmp_path / "results" / "runs").iterdir())[-1]
    assert "no route to host" in read_manifest(last)["warnings"][0]
