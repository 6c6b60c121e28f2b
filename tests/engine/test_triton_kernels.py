"""Triton's kernels run wherever Triton is installed: compiled on a GPU, elsewhere by its interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeless.engine.triton_kernels import available

ROOT = Path(__file__).resolve().parents[2]


def run_alone(*tests):
    """Run tests in a process of their own: Triton chooses between compiler and interpreter when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


def test_kernels_agree_with_float64_and_with_the_engines_order():
    pytest.importorskip("triton")
    run_alone(
        "tests/engine/triton_on_device.py",
        "tests/profiling/test_measuring.py::test_hot_path_kernels_agree_with_float64",
    )


def test_kernels_are_offered_only_where_they_run(monkeypatch):
    """The interpreter's variable counts as it was when Triton was imported, not as it is now."""
    pytest.importorskip("triton")
    before = available(torch.device("cpu"))
    for value in ("1", "0"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert available(torch.device("cpu")) == before
    assert available(torch.device("cuda"))
