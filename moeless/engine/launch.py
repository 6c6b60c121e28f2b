"""Starting ranks as forked processes of one machine, and ending them."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from moeless.errors import RunFailed, UserError

#: Seconds that the launcher waits for the rank that caused a failure when another reported its loss first.
CAUSE_SECONDS = 3.0
_POLL_SECONDS = 0.02
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Report:
    """How a rank ended: ``kind`` is user, run, peer (it lost another rank) or crash."""

    kind: str
    message: str


def describe(error: BaseException) -> Report:
    """A rank's exception as a report."""
    if isinstance(error, UserError):
        return Report("user", str(error))
    if isinstance(error, RunFailed):
        return Report("run", str(error))
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    lost = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError") or re.search(
        r"gloo|peer|connection (closed|reset|refused)|timed out", str(error), re.IGNORECASE
    )
    return Report("peer" if lost else "crash", f"{type(error).__name__}: {first}")


class ForkedRanks:
    """Child processes of this one, one per rank.

    This process should have no other thread: a lock that one holds at the moment of the fork stays locked in the child.
    :class:`moeless.engine.forkserver.ForkServer` starts such a process. Each child runs ``work(rank)``, dies with this
    process, and leaves by ``os._exit``.
    """

    def __init__(self, work: Callable[[int], None], ranks: int) -> None:
        self.pids: dict[int, int] = {}
        self._pipes: dict[int, int] = {}
        self._work = work
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        try:
            for rank in range(ranks):
                self._start(rank)
        except BaseException:
            self.kill()
            raise

    def _start(self, rank: int) -> None:
        parent = os.getpid()
        # a signal's handler may raise; within a fork that would be lost, and so would the child before it is noted
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    os.close(reading)
                    die_with(parent)
                    code = _child(self._work, rank, writing, mask)
                finally:
                    os._exit(code)
            os.close(writing)
            self.pids[rank], self._pipes[rank] = pid, reading
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def wait(self) -> None:
        """Return when every rank has ended well.

        Raises:
            UserError: a rank refused the request.
            RunFailed: a rank failed or was killed; the others are ended first. The sentence names the rank.
        """
        failed: dict[int, tuple[int, Report | None]] = {}
        deadline = None
        try:
            while self.pids:
                for rank, code in self._reap():
                    report = self._report(rank)
                    if code != 0:
                        failed[rank] = (code, report)
                if failed:
                    deadline = deadline or time.monotonic() + CAUSE_SECONDS
                    if any(report is None or report.kind != "peer" for _, report in failed.values()):
                        break
                    if time.monotonic() > deadline:
                        break
                if self.pids:
                    time.sleep(_POLL_SECONDS)
        finally:
            self.kill()
        if failed:
            raise_failure(failed)

    def _reap(self) -> list[tuple[int, int]]:
        ended = []
        for rank, pid in list(self.pids.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del self.pids[rank]
                ended.append((rank, os.waitstatus_to_exitcode(status)))
        return ended

    def _report(self, rank: int) -> Report | None:
        with os.fdopen(self._pipes.pop(rank), "rb") as pipe:
            text = pipe.read()
        return Report(**json.loads(text)) if text else None

    def kill(self) -> None:
        """End every rank that still runs."""
        for pid in self.pids.values():
            os.kill(pid, signal.SIGKILL)
        for pid in self.pids.values():
            os.waitpid(pid, 0)
        self.pids.clear()
        for pipe in self._pipes.values():
            os.close(pipe)
        self._pipes.clear()


def _child(work: Callable[[int], None], rank: int, pipe: int, mask: set[int]) -> int:
    import torch

    # an interrupt is the parent's to handle: it ends the ranks
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    torch.set_num_threads(1)
    try:
        work(rank)
        return 0
    except BaseException as error:
        report = describe(error)
        if report.kind == "crash" and os.environ.get("MOELESS_TRACEBACK"):
            import traceback

            traceback.print_exc()
        os.write(pipe, json.dumps(report.__dict__).encode()[:60_000])
        return 1
    finally:
        sys.stderr.flush()


def die_with(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel send this process a signal when its parent ends (Linux; elsewhere the parent ends it)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
        if os.getppid() != parent:
            os._exit(1)


def raise_failure(failed: dict[int, tuple[int, Report | None]]) -> None:
    """Raise for the rank that caused a failure, given exit status and report of the ranks that failed.

    Raises:
        UserError, RunFailed: always; see :meth:`ForkedRanks.wait`.
    """

    def blame(entry: tuple[int, tuple[int, Report | None]]) -> tuple[int, int]:
        rank, (code, report) = entry
        return (0 if code < 0 else 1 if report and report.kind != "peer" else 2, rank)

    rank, (code, report) = min(failed.items(), key=blame)
    if code < 0:
        raise RunFailed(f"rank {rank} was killed by {_signal(-code)}; the run was stopped")
    if report is None:
        raise RunFailed(f"rank {rank} ended with exit status {code}; the run was stopped")
    if report.kind == "user":
        raise UserError(report.message)
    if report.kind == "peer":
        raise RunFailed(f"rank {rank} lost the other ranks ({report.message}); the run was stopped")
    raise RunFailed(f"rank {rank} failed: {report.message}")


def _signal(number: int) -> str:
    """A signal's name, and what is most often behind it."""
    name = signal.Signals(number).name
    return name + {
        "SIGKILL": " (by someone, or by the kernel because memory ran out)",
        "SIGBUS": " (a file that it keeps in memory, in /dev/shm or the temporary folder, found no room)",
    }.get(name, "")


def run_forked(work: Callable[[int], None], ranks: int) -> None:
    """Run ``work(rank)`` in forked processes; see :meth:`ForkedRanks.wait` for what it raises."""
    ForkedRanks(work, ranks).wait()
