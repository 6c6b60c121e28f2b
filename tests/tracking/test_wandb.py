"""W&B sees what the run folder holds, and never decides whether a run succeeds."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
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
    from moeless.report import charts

    with start_run("reproduce", "x", {}, 0, [], tmp_path / "run") as run:
        run.figure("loads", charts.popularity([[1, 2], [3, 4]]), "Loads", "caption")
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
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, None, "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "Offline"}, None, "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "of-line"}, True, "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "shared"}, None, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_DISABLED": "true"}, None, "disabled"),
        ({"WANDB_API_KEY": "k", "WANDB_DISABLED": "true", "WANDB_MODE": "online"}, True, "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_DISABLED": "false"}, None, "online"),
    ],
)
def test_offline_unless_logged_in_or_told_otherwise(
    clean: Path, monkeypatch: pytest.MonkeyPatch, environment: dict, wanted: bool | None, mode: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choose_mode(wanted) == mode


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working folder, nothing set, and no login stored."""
    for name in ("MODE", "API_KEY", "BASE_URL", "DISABLED", "DIR", "IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.mark.parametrize("folder", ["config", "here/wandb", "here/.wandb"])
@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ("mode = offline", "offline"),
        ("mode = dryrun", "offline"),
        ("mode = disabled", "disabled"),
        ("disabled = true", "offline"),
        ("mode = online", "online"),
        ("project = 50%", "online"),
        ("no settings", "online"),
    ],
)
def test_what_wandb_offline_and_disabled_wrote_holds_for_who_is_logged_in(
    clean: Path, monkeypatch: pytest.MonkeyPatch, folder: str, settings: str, mode: str
) -> None:
    (clean / folder).mkdir()
    (clean / folder / "settings").write_text(f"[default]\n{settings}\n")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert choose_mode(None) == mode
    # the environment goes first, as for W&B
    monkeypatch.setenv("WANDB_MODE", "online")
    assert choose_mode(None) == "online"


def test_a_login_counts_for_the_server_that_is_set(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (clean / "netrc").write_text("machine wandb.corp.org:8080 login user password x\n")
    monkeypatch.setenv("NETRC", str(clean / "netrc"))
    assert choose_mode(None) == "offline"
    (clean / "config").mkdir()
    (clean / "config" / "settings").write_text("[default]\nbase_url = http://wandb.corp.org:8080\n")
    assert choose_mode(None) == "online"


def test_without_a_home_there_is_no_login_and_no_error(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_uid: int) -> None:
        raise KeyError("uid not found")

    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert choose_mode(None) == "offline"


def _own_settings(monkeypatch: pytest.MonkeyPatch, **settings: object) -> list[dict]:
    """Give the stand-in settings of its own; returns the calls of ``init``."""
    module = sys.modules["wandb"]
    singleton = types.SimpleNamespace(settings=types.SimpleNamespace(**settings))
    monkeypatch.setattr(module, "setup", lambda: singleton, raising=False)
    return module.calls


@pytest.mark.parametrize(("own", "wanted", "modes"), [("offline", None, ["offline"]), ("disabled", None, [])])
def test_nothing_is_sent_where_any_of_wandb_s_own_settings_says_not_to(
    tmp_path: Path, stand_in: StandInRun, monkeypatch: pytest.MonkeyPatch, own: str, wanted: bool | None, modes: list
) -> None:
    calls = _own_settings(monkeypatch, mode=own, base_url="http://127.0.0.1:1")
    with start_run("demo", "x", {}, 0, [], tmp_path / "run", wanted):
        pass
    assert [call["mode"] for call in calls] == modes
    assert read_manifest(tmp_path / "run")["warnings"] == []


def test_a_server_out_of_reach_means_offline_and_one_remark(
    tmp_path: Path, stand_in: StandInRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as taken:
        # bound, not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        calls = _own_settings(monkeypatch, mode="online", base_url=f"http://127.0.0.1:{taken.getsockname()[1]}")
        with start_run("demo", "x", {}, 0, [], tmp_path / "run") as run:
            run.log({"a": 1})
    assert [call["mode"] for call in calls] == ["offline"]
    assert stand_in.rows == [{"a": 1}]
    (warning,) = read_manifest(tmp_path / "run")["warnings"]
    assert "cannot be reached" in warning
    assert "wandb sync" in warning
    assert capsys.readouterr().err == f"moeless: {warning}\n"


def test_a_server_that_takes_no_run_means_offline_and_one_remark(
    tmp_path: Path, stand_in: StandInRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: object) -> StandInRun:
        if options["mode"] == "online":
            raise ConnectionError("timed out")
        return stand_in

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with start_run("demo", "x", {}, 0, [], tmp_path / "run") as run:
        run.log({"a": 1})
    assert stand_in.rows == [{"a": 1}]
    (warning,) = read_manifest(tmp_path / "run")["warnings"]
    assert "timed out" in warning
    assert "wandb sync" in warning


def test_the_oldest_wandb_is_told_to_start_anew_in_its_own_words(
    tmp_path: Path, stand_in: StandInRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*, reinit: object, **_: object) -> StandInRun:
        if not isinstance(reinit, bool):
            raise ValueError("Input should be a valid boolean")
        return stand_in

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with start_run("demo", "x", {}, 0, [], tmp_path / "run") as run:
        run.log({"a": 1})
    assert stand_in.rows == [{"a": 1}]
    assert read_manifest(tmp_path / "run")["warnings"] == []


def test_the_manifest_is_final_before_wandb_ends(
    tmp_path: Path, stand_in: StandInRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def finish(exit_code: int) -> None:
        seen.append(read_manifest(tmp_path / "run")["status"])
        raise ConnectionError("no route to host")

    monkeypatch.setattr(stand_in, "finish", finish)
    with start_run("demo", "x", {}, 0, [], tmp_path / "run"):
        pass
    assert seen == ["ok"]
    assert "no route to host" in read_manifest(tmp_path / "run")["warnings"][0]


def test_an_interrupted_run_does_not_wait_for_wandb(
    tmp_path: Path, stand_in: StandInRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(stand_in, "finish", lambda **_: released.wait(60))
    monkeypatch.setattr("moeless.tracking.wandb.HURRY_SECONDS", 0.01)
    with pytest.raises(KeyboardInterrupt), start_run("demo", "x", {}, 0, [], tmp_path / "run"):
        raise KeyboardInterrupt
    released.set()
    manifest = read_manifest(tmp_path / "run")
    assert manifest["status"] == "interrupted"
    assert "did not finish" in manifest["warnings"][0]


def test_termination_while_wandb_starts_leaves_no_run_behind(
    tmp_path: Path, stand_in: StandInRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(KeyboardInterrupt), start_run("demo", "x", {}, 0, [], tmp_path / "run"):
            pass
    finally:
        signal.signal(signal.SIGTERM, before)
    assert list(tmp_path.iterdir()) == []


def test_wandb_keeps_its_files_with_the_run_where_home_cannot_be_written(
    tmp_path: Path, stand_in: StandInRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("CACHE", "DATA", "CONFIG"):
        # set first, so that what the run sets is undone
        monkeypatch.setenv(f"WANDB_{kind}_DIR", "")
        monkeypatch.delenv(f"XDG_{kind}_HOME", raising=False)
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with start_run("demo", "x", {}, 0, [], tmp_path / "run"):
        assert Path(os.environ["WANDB_CACHE_DIR"]).is_relative_to(tmp_path / "run" / "wandb")


def test_a_command_with_its_own_result_needs_no_writable_working_folder(
    tmp_path: Path, stand_in: StandInRun, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").write_text("a file: no run folder can be made")
    (tmp_path / "routing.csv").write_text("layer,token,experts\n0,0,1 2\n0,1,0 3\n")
    command = ("import-trace", "routing.csv", "--from", "csv", "--layers", 1, "--experts", 4, "--top-k", 2, "--out")
    status, _, error = cli(*command, "first")
    assert status == 0, error
    assert (tmp_path / "first" / "trace.json").is_file()
    assert "no run folder" in error
    status, _, error = cli(*command, "second", "--wandb")
    assert status == 2
    assert "results" in error


def test_a_stored_login_means_online(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path = clean
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
