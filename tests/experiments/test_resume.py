"""The whole command: interrupted, continued, and one result lost; each ends where an undisturbed run does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moeless.spec import preset
from moeless.traces.synthetic import SyntheticParams, write_synthetic


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    params = SyntheticParams(prompt_tokens=12, output_tokens=4)
    write_synthetic(tmp_path / "trace", preset("bundled"), requests=40, params=params)
    return tmp_path / "trace"


def _start(tmp_path: Path, trace: Path, out: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "moeless", "reproduce", "fig4", "--trace", trace, "--costs", "paper"]
    command += ["--cluster", "cpu8", "--jobs", "1", "--no-wandb"]
    command += ["--cache", tmp_path / "cache", "--out", tmp_path / out]
    return subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        # a shell's background job ignores interrupts, and so would everything it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _entries(tmp_path: Path, kind: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted((tmp_path / "cache" / kind).glob("??/*.json"))}


def _done(tmp_path: Path, out: str) -> tuple[int, int]:
    (entry,) = json.loads((tmp_path / out / "reproduction.json").read_text())["experiments"]
    return entry["computed"], entry["cached"]


def test_an_interrupted_run_continues_and_a_lost_result_comes_back_to_the_byte(tmp_path: Path, trace: Path) -> None:
    first = _start(tmp_path, trace, "first")
    deadline = time.monotonic() + 900
    while not _entries(tmp_path, "cells") and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    _, error = first.communicate(timeout=900)
    assert first.returncode == 130, error
    assert "the same command continues from there" in error
    assert error.rstrip().endswith("moeless: interrupted")
    assert "Traceback" not in error
    assert json.loads((tmp_path / "first" / "manifest.json").read_text())["status"] == "interrupted"

    second = _start(tmp_path, trace, "second")
    _, error = second.communicate(timeout=900)
    assert second.returncode == 0, error
    computed, cached = _done(tmp_path, "second")
    # the trace itself, three systems, and the fit of the third's predictor
    assert computed + cached == 5
    assert cached >= 2

    cells, fits = _entries(tmp_path, "cells"), _entries(tmp_path, "artefacts")
    lost = next(path for path, text in cells.items() if b"by moeless" in text)
    lost.unlink()
    for path in fits:
        path.unlink()
    third = _start(tmp_path, trace, "third")
    _, error = third.communicate(timeout=900)
    assert third.returncode == 0, error
    assert _done(tmp_path, "third")[0] == 2
    assert _entries(tmp_path, "cells") == cells
    assert _entries(tmp_path, "artefacts") == fits
