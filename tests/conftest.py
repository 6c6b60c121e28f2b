"""Fixtures and paths that several parts' tests share."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# before torch is imported anywhere: two workers on two cores, one thread each
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real routing traces, arrivals and prompts; tests that need it are skipped elsewhere."""
    folder = Path(os.environ.get("MOELESS_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("needs the development data: set MOELESS_SHARED_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def bundled_model() -> Path:
    """Folder of the bundled model, weights included."""
    return ROOT / "moeless" / "assets" / "model"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]):
    """Run a command line in this process: ``cli("plan", "x") -> (status, stdout, stderr)``."""
    from moeless.cli.main import run

    def call(*arguments: object) -> tuple[int, str, str]:
        # rich asks for the width of a terminal that is not there
        os.environ.setdefault("COLUMNS", "200")
        argv = sys.argv
        sys.argv = ["moeless", *map(str, arguments)]
        try:
            with pytest.raises(SystemExit) as stopped:
                run([str(argument) for argument in arguments])
        finally:
            sys.argv = argv
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def ordinary_rights() -> Iterator[None]:
    """Let files' access rights bind this thread as they bind an ordinary user; root's would not, and are put back.

    Processes that it starts as root have all rights again.
    """
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    # version 3 of the interface; two words each of effective, permitted and inheritable capabilities
    header, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    lowered = (ctypes.c_uint32 * 6)(*before)
    # not to override access rights, nor to read and search everywhere
    lowered[0] &= ~(1 << 1 | 1 << 2) & 0xFFFFFFFF
    assert libc.capset(header, lowered) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0
