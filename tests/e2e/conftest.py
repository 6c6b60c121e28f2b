"""One small recording that the tests of whole commands share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of the bundled model with gate inputs, made by the command in a process of its own."""
    out = tmp_path_factory.mktemp("recorded") / "trace"
    line = ["trace", "bundled", "bundled", "--max-requests", "24", "--max-new-tokens", "12", "--router-inputs"]
    done = subprocess.run(
        [sys.executable, "-m", "moeless", *line, "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out
