"""A measurement among forked ranks, run as a program of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from moeless.errors import RunFailed


def run_program(module: str, arguments: list[str], out: Path, *, quick: bool, what: str) -> None:
    """Run ``python -m module arguments [--quick]``, which writes ``out``, with one thread to a rank.

    Args:
        what: what is measured, as the error says it.

    Raises:
        RunFailed: the program failed or left no result.
    """
    ended = subprocess.run(
        [sys.executable, "-m", module, *arguments, *(["--quick"] if quick else [])],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
        check=False,
    )
    if ended.returncode or not out.exists():
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFailed(f"measuring {what} failed: {last}")
