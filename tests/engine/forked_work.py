"""Work for forked ranks, found by name in the process that forks them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from moeless.errors import UserError


def hanging(folder: str) -> Callable[[int], None]:
    def work(rank: int) -> None:
        (Path(folder) / f"{rank}.new").write_text(str(os.getpid()))
        (Path(folder) / f"{rank}.new").rename(Path(folder) / f"{rank}.pid")
        threading.Event().wait(600)

    return work


def ended_within_a_fork(folder: str) -> Callable[[int], None]:
    """The process that forks is told to end at the moment of its first fork."""
    forks: list[None] = []
    os.register_at_fork(
        after_in_parent=lambda: None if forks else forks.append(None) or os.kill(os.getpid(), signal.SIGTERM)
    )

    def work(_: int) -> None:
        (Path(folder) / f"{os.getpid()}.pid").touch()
        threading.Event().wait(600)

    return work


def killed(_: None) -> Callable[[int], None]:
    return lambda rank: os.kill(os.getpid(), signal.SIGBUS) if rank == 1 else threading.Event().wait(600) or None


def refusing(sentence: str) -> Callable[[int], None]:
    raise UserError(sentence)


def broken(_: None) -> Callable[[int], None]:
    raise ZeroDivisionError("division by zero\nsecond line")


def counting_threads(argument: dict[str, str]) -> Callable[[int], None]:
    """What ranks of a job need is prepared; each writes how many threads the process that forked it has."""
    from moeless.engine.start import ranks_of

    ranks_of(argument["job"])

    def work(rank: int) -> None:
        tasks = len(list(Path(f"/proc/{os.getppid()}/task").iterdir()))
        (Path(argument["folder"]) / f"threads-{rank}").write_text(str(tasks))

    return work
