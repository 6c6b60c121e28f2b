"""Functions that the cache and runner tests run as jobs; imported by worker processes too."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any


def square(params: dict[str, Any], needs: list[Any]) -> dict[str, Any]:
    """Squares ``x``, adds what it needs, and leaves a line in the ``log`` file for every call."""
    with Path(params["log"]).open("a") as log:
        log.write(f"{params['x']}\n")
    return {"value": params["x"] ** 2 + sum(need["value"] for need in needs), "third": 1 / 3}


def fill(params: dict[str, Any], needs: list[Any], folder: Path) -> None:
    """An artefact of two files."""
    (folder / "a.txt").write_text(str(params["x"]))
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text("b")


def read(params: dict[str, Any], needs: list[Any]) -> str:
    """Reads the artefact."""
    return (Path(needs[0]) / "a.txt").read_text()


def interrupt(params: dict[str, Any], needs: list[Any]) -> None:
    """Stands for a person's Ctrl-C in the middle."""
    raise KeyboardInterrupt


def die(params: dict[str, Any], needs: list[Any]) -> None:
    """Stands for a worker killed for lack of memory."""
    os._exit(9)


def park(params: dict[str, Any], needs: list[Any]) -> None:
    """Holds the ``pipe`` open, which tells that it works and when it is gone, and never ends by itself."""
    with Path(params["pipe"]).open("w") as pipe:
        pipe.write("here")
        pipe.flush()
        signal.pause()


def fill_together(params: dict[str, Any], needs: list[Any], folder: Path) -> None:
    """An artefact that two processes make at the same time: each waits until the other has begun."""
    fill(params, needs, folder)
    met = Path(params["met"])
    (met / str(os.getpid())).touch()
    while len(list(met.iterdir())) < 2:
        time.sleep(0.01)


def huge(params: dict[str, Any], needs: list[Any]) -> str:
    """More than the size-limited folder takes."""
    return "x" * 1_000_000
