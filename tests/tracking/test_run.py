"""A run folder keeps what happened, however the run ends."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from moeless.errors import RunFailed, UserError
from moeless.tracking import find_runs, read_manifest, start_run
from moeless.tracking.environment import fingerprint, hardware
from moeless.tracking.run import slug


def _open(out: Path | None, **more):
    return start_run(
        "serve-bench", "gpt-oss 20B", {"rate": 2.0, "path": Path("x")}, seed=7, out=out, wandb=False, **more
    )


def _write_then_raise(out: Path, error: BaseException) -> None:
    with _open(out) as run:
        run.log({"step": 1})
        raise error


def test_a_finished_run_says_what_was_asked_with_what_and_what_came_out(tmp_path: Path) -> None:
    source = tmp_path / "input.txt"
    source.write_text("hello")
    with _open(tmp_path / "run", inputs=[source]) as run:
        run.log({"layer_ms": 1.5})
        run.log({"layer_ms": 2.5, "policy": "static"})
        run.write_result({"schema_version": 1, "command": "serve-bench", "cells": []})
    manifest = read_manifest(tmp_path / "run")
    assert manifest["status"] == "ok"
    assert manifest["config"] == {"rate": 2.0, "path": "x"}
    assert manifest["seed"] == 7
    assert manifest["inputs"][0]["sha256"] == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert manifest["outputs"][0]["path"] == "result.json"
    assert manifest["versions"]["python"]
    assert manifest["hardware"]["cores"] >= 1
    assert manifest["start"] <= manifest["end"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["layer_ms"] for row in rows] == [1.5, 2.5]


@pytest.mark.parametrize(
    ("raised", "status"),
    [(ValueError("boom"), "failed"), (RunFailed("no luck"), "failed"), (KeyboardInterrupt(), "interrupted")],
)
def test_a_broken_run_keeps_its_rows_and_its_status(tmp_path: Path, raised: BaseException, status: str) -> None:
    with pytest.raises(type(raised)):
        _write_then_raise(tmp_path / "run", raised)
    manifest = read_manifest(tmp_path / "run")
    assert manifest["status"] == status
    assert manifest["error"].startswith(type(raised).__name__)
    assert "step" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_refused_request_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError), _open(tmp_path / "run"):
        raise UserError("no such policy")
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_after_work_was_done_keeps_the_work(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        _write_then_raise(tmp_path / "run", UserError("the second policy is unknown"))
    assert read_manifest(tmp_path / "run")["status"] == "failed"


def test_an_existing_empty_folder_is_used_and_stays_after_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError), _open(tmp_path / "run"):
        raise UserError("no")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_with_content_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty"), _open(tmp_path):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_a_missing_input_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"), _open(tmp_path / "run", inputs=[tmp_path / "none"]):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_input_that_cannot_be_read_is_refused_before_a_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("moeless.tracking.environment.sha256", refuse)
    for source in (tmp_path / "input", tmp_path / "folder" / "input"):
        source.parent.mkdir(exist_ok=True)
        source.write_text("x")
    for given in ("input", "folder"):
        with (
            pytest.raises(UserError, match=f"cannot read .*{given}"),
            _open(tmp_path / "run", inputs=[tmp_path / given]),
        ):
            pass
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_listed_has_no_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot read"):
        fingerprint(tmp_path)


def test_a_refusal_of_the_file_system_leaves_a_folder_only_if_work_was_done(tmp_path: Path) -> None:
    refusal = PermissionError(errno.EACCES, "Permission denied", "/data/trace/shard-0")
    with pytest.raises(PermissionError), _open(tmp_path / "run"):
        raise refusal
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PermissionError):
        _write_then_raise(tmp_path / "run", refusal)
    assert read_manifest(tmp_path / "run")["status"] == "failed"
    with pytest.raises(TimeoutError), _open(tmp_path / "other"):
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")
    assert read_manifest(tmp_path / "other")["status"] == "failed"


def test_a_run_folder_that_cannot_be_made_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "run"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="no run folder can be made"), _open(tmp_path / "run"):
        pass


def test_cores_and_memory_are_what_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeless.tracking.environment.memory_bytes", lambda: 2**30)
    monkeypatch.setattr("moeless.tracking.environment.processor_quota", lambda: 1.5)
    facts = hardware()
    assert facts["memory_bytes"] == 2**30
    assert facts["quota"] == 1.5


def test_a_closing_terminal_ends_a_run_like_an_interrupt_but_not_under_nohup(tmp_path: Path) -> None:
    def hung_up() -> None:
        with _open(tmp_path / "run"):
            assert signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt):
            hung_up()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with _open(tmp_path / "nohup"):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert read_manifest(tmp_path / "run")["status"] == "interrupted"
    assert read_manifest(tmp_path / "nohup")["status"] == "ok"


def test_default_folders_are_named_by_time_command_and_name_and_never_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        with _open(None):
            pass
    runs = find_runs()
    assert len(runs) == 3
    assert all("-serve-bench-gpt-oss-20b" in run.name for run in runs)


def _behind_another(error: OSError) -> Exception:
    """What a compressing writer raises when closing its file fails on top."""
    wrapped = ValueError("inconsistent stream state")
    wrapped.__context__ = error
    return wrapped


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        _behind_another(OSError(errno.ENOSPC, "No space left on device")),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["plain", "wrapped", "told in text"],
)
def test_a_full_disk_ends_in_a_sentence_and_keeps_what_was_written(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(RunFailed, match="disk is full"):
        _write_then_raise(tmp_path / "run", error)
    assert read_manifest(tmp_path / "run")["status"] == "failed"


def test_termination_is_recorded_as_an_interrupt(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _open(tmp_path / "run"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert read_manifest(tmp_path / "run")["status"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


def test_figures_are_saved_in_three_formats_with_stable_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        figure, axes = plt.subplots()
        axes.plot([1, 2, 3])
        with _open(tmp_path / name) as run:
            run.figure("line", figure, "A line", "It rises.", ("svg", "png", "pdf"))
        plt.close(figure)
        folder = tmp_path / name / "figures"
        assert sorted(path.suffix for path in folder.iterdir()) == [".pdf", ".png", ".svg"]
        contents.append((folder / "line.png").read_bytes())
    assert contents[0] == contents[1]
    assert read_manifest(tmp_path / "a")["figures"] == [{"name": "line", "title": "A line", "caption": "It rises."}]


def test_a_folder_fingerprint_depends_on_names_and_contents_only(tmp_path: Path) -> None:
    for name, order in (("a", ("x", "y")), ("b", ("y", "x"))):
        (tmp_path / name).mkdir()
        for entry in order:
            (tmp_path / name / entry).write_text(entry)
    same = fingerprint(tmp_path / "a")["sha256"]
    assert fingerprint(tmp_path / "b")["sha256"] == same
    (tmp_path / "b" / "y").rename(tmp_path / "b" / "z")
    assert fingerprint(tmp_path / "b")["sha256"] != same


@pytest.mark.parametrize("content", ["not json", "[]", '{"format": 2}'])
def test_a_damaged_manifest_is_refused_with_a_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_slugs_are_safe_folder_names() -> None:
    assert slug("../../etc/Pass wd") == "etc-pass-wd"
    assert slug("***") == "run"
