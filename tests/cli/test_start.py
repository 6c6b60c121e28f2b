"""What a command does before its work: it imports and compiles nothing that it does not need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeless import jit

TRACE = Path(__file__).resolve().parents[1] / "fixtures" / "traces" / "tokens"
#: Runs a command line and prints whether numba was imported.
PROGRAM = """
import sys
from moeless.cli.main import run
sys.argv[0] = "moeless"
try:
    run()
except SystemExit as stopped:
    print("status", stopped.code or 0, "numba" in sys.modules)
"""


def _run(arguments: list[str], here: Path, **environment: str) -> tuple[str, str]:
    """The last line of standard output, and standard error, of a command in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=here,
        env=os.environ | {"NUMBA_CACHE_DIR": str(here / "compiled")} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return ended.stdout.strip().splitlines()[-1], ended.stderr


@pytest.mark.parametrize("line", ["--help", "serve-bench --help", "models mixtral-8x7b", "compare --help"])
def test_commands_that_compute_nothing_import_no_numba(line: str, tmp_path: Path) -> None:
    assert _run(line.split(), tmp_path) == ("status 0 False", "")


@pytest.mark.skipif(not jit.COMPILED, reason="numba is not installed")
def test_a_dry_run_compiles_no_planner_and_no_simulator(tmp_path: Path) -> None:
    line = f"serve-bench --trace {TRACE} --policy static --policy elastic --dry-run"
    last, err = _run(line.split(), tmp_path)
    assert last.startswith("status 0"), err
    # it counts the trace's loads
    assert {path.name.split(".")[0] for path in tmp_path.rglob("*.nbi")} == {"compose"}


@pytest.mark.skipif(not jit.COMPILED, reason="numba is not installed")
def test_compiling_is_announced_once_and_only_where_it_happens(tmp_path: Path) -> None:
    program = (
        "from moeless.cli.main import announce_compiling\n"
        "announce_compiling()\n"
        "import numpy as np\n"
        "from moeless.traces.compose import total_load\n"
        "total_load(np.zeros((2, 1, 1), np.uint16), 4)\n"
    )

    def remarks() -> list[str]:
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "COLUMNS": "500"}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        return done.stderr.splitlines()

    first = remarks()
    assert len(first) == 1
    assert str(tmp_path / "moeless") in first[0]
    assert remarks() == []
