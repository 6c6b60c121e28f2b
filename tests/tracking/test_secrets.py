"""A password that was typed stands in no file of a run, not in W&B's, and in no message."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from moeless.tracking import read_manifest, start_run

SECRET = "hunter22Secret"
KEY = "0123456789abcdef0123456789abcdef01234567"


def _files_with(folder: Path, secret: str) -> list[str]:
    """Every file below a folder that holds a text, W&B's binary logs included."""
    files = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return [str(path) for path in files if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("mirrored", [True, False])
def test_a_study_s_password_stands_nowhere_in_its_run(tmp_path: Path, cli: Any, mirrored: bool) -> None:
    if mirrored:
        pytest.importorskip("wandb")
    trace = tmp_path / "trace"
    recorded = ("trace", "bundled", "bundled", "--max-requests", 8, "--max-new-tokens", 2, "--out", trace)
    assert cli(*recorded, "--no-wandb")[0] == 0
    # SQLite ignores what it does not know
    storage = f"sqlite:///file:{tmp_path / 'studies.db'}?uri=true&password={SECRET}"
    run = tmp_path / "run"
    options = ("--cluster", "cpu8", "--trials", 1, "--max-requests", 4, "--storage", storage, "--out", run)
    status, out, error = cli("tune", trace, *options, "--wandb" if mirrored else "--no-wandb")
    assert status == 0, error
    assert SECRET not in out + error
    assert _files_with(run, SECRET) == []
    manifest = read_manifest(run)
    assert not [warning for warning in manifest["warnings"] if "W&B" in warning]
    assert "password=***" in manifest["command_line"]
    assert json.loads((run / "result.json").read_text())["command"] == manifest["command_line"]
    assert bool(list(run.glob("wandb/offline-run-*/*.wandb"))) == mirrored
    status, out, _ = cli("tune", trace, *options[:-2], "--dry-run")
    assert status == 0
    assert SECRET not in out
    assert "password=***" in out


@pytest.mark.parametrize(
    "storage", [f"postgresql://me:{SECRET}@127.0.0.1:1/db", f"nothing://me:{SECRET}", f"x:{SECRET}@h/y"]
)
def test_a_message_shows_no_password(tmp_path: Path, cli: Any, storage: str) -> None:
    (tmp_path / "trace").mkdir()
    status, out, error = cli(
        "tune", tmp_path / "trace", "--storage", storage, "--policy", storage, "--out", tmp_path / "run"
    )
    assert status == 2
    assert SECRET not in out + error


def test_a_run_keeps_no_secret_of_its_command_its_configuration_its_rows_or_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"postgresql://me:{SECRET}@host/db"
    command = ["moeless", "demo", "--storage", address, "--api-key", KEY, f"--token={SECRET}"]
    monkeypatch.setattr(sys, "argv", command)
    config = {"storage": address, "nested": {"api_key": KEY, "revision": KEY[::-1]}, "many": [address]}

    def fail() -> None:
        with start_run("demo", address, config, out=tmp_path / "run", wandb=False) as run:
            run.log({"storage": address, "loss": 1.5})
            run.write_result({"command": address, "cells": []})
            run.warn(f"{address} is slow")
            # a library's message may quote the password alone
            raise ValueError(f"invalid port: {SECRET!r}")

    with pytest.raises(ValueError, match="invalid port"):
        fail()
    assert _files_with(tmp_path, SECRET) == _files_with(tmp_path, KEY) == []
    manifest = read_manifest(tmp_path / "run")
    assert shlex.split(manifest["command_line"])[-3:] == ["--api-key", "***", "--token=***"]
    assert manifest["config"]["nested"] == {"api_key": "***", "revision": KEY[::-1]}
    assert manifest["error"] == "ValueError: invalid port: '***'"


def test_a_run_s_folder_is_not_named_after_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with start_run("demo", f"postgresql://me:{SECRET}@host/db", {}, wandb=False) as run:
        pass
    assert not re.search(SECRET, str(run.path), re.IGNORECASE)
    assert run.path.name.endswith("postgresql-me-host-db")
