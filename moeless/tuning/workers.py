"""Who runs which trial of a study that several processes share, and which trials were left behind.

Whoever runs a trial says so in an attribute of it and counts up there while it works. A process in the same process-id
namespace of the same running kernel is looked up. Of any other one the count has to advance, by the clock of whoever
looks: names of machines, their clocks and time zones do not matter.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

#: Attribute of a trial that says who runs it, of a failed one that says why.
WORKER, REASON = "worker", "reason"
#: Seconds between two counts of whoever runs a trial.
BEAT_SECONDS = 10.0
#: Seconds without a new count after which a trial is taken for abandoned.
GRACE_SECONDS = 60.0

_PROC = Path("/proc")
#: Random names of the trials that this process runs now.
_AT_WORK: set[str] = set()


@contextlib.contextmanager
def working(trial: optuna.Trial) -> Iterator[None]:
    """Say who runs a trial, and keep counting from a thread until the block ends."""
    me = {"id": secrets.token_hex(8), **identity()}
    stop = threading.Event()

    def count() -> None:
        beats = 0
        while not stop.wait(BEAT_SECONDS):
            beats += 1
            # the storage is out of reach for a moment, or the trial was taken away: whoever runs it will see
            with contextlib.suppress(Exception):
                trial.set_user_attr(WORKER, {**me, "beats": beats})

    _AT_WORK.add(me["id"])
    try:
        trial.set_user_attr(WORKER, {**me, "beats": 0})
        thread = threading.Thread(target=count, name=f"trial {trial.number}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
    finally:
        _AT_WORK.discard(me["id"])


def identity() -> dict[str, Any]:
    """This process, as a neighbour on the same kernel can look it up."""
    return _identity(os.getpid())


@lru_cache(maxsize=1)
def _identity(pid: int) -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": pid, "born": _born(pid), "kernel": _kernel()}


def _kernel() -> str | None:
    """Names the running kernel and the namespaces in which a process id and its start time hold."""
    try:
        # a namespace may be without its own view of processes
        if str((_PROC / "self").readlink()) != str(os.getpid()):
            return None
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        pids = (_PROC / "self/ns/pid").readlink()
        # kernels before 5.6 have no namespaces of time
        times = _PROC / "self/ns/time"
        return f"{boot} {pids} {times.readlink() if times.is_symlink() else 'time'}"
    except OSError:
        return None


def _born(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; empty for one that has ended, None where that is kept secret."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    # a killed process that nobody has waited for is still listed
    return "" if fields[0] in "ZX" else fields[19]


def lives(worker: Mapping[str, Any]) -> bool | None:
    """Whether whoever ran a trial still does; None where that cannot be looked up."""
    me = identity()
    if worker.get("id") in _AT_WORK:
        return True
    if me["kernel"] is None or worker.get("kernel") != me["kernel"]:
        return None
    if worker["pid"] == me["pid"]:
        # an earlier trial of this process, whose end could not be written, or one of an earlier process
        return False
    try:
        os.kill(worker["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    born = _born(worker["pid"])
    return None if born is None or worker["born"] is None else born == worker["born"]


@dataclass
class _Seen:
    """What was last read of a running trial's worker.

    Attributes:
        worker: the attribute.
        at: when it was read, in seconds of this process's clock.
        still: seconds for which it has not changed.
        moved: it changed since this process began to look.
        alive: by a look at the process, None where that is not possible.
    """

    worker: Any
    at: float
    still: float = 0.0
    moved: bool = False
    alive: bool | None = None


class Watch:
    """One process's view of a study's running trials."""

    def __init__(self, study: optuna.Study, clock: Callable[[], float] = time.monotonic) -> None:
        self._study = study
        self._clock = clock
        self._seen: dict[int, _Seen] = {}

    def reap(self) -> int:
        """Fail the trials of dead processes and queue their parameters again; returns how many."""
        dead = [trial for trial in self._look() if self._dead(trial)]
        return sum(self._give_back(trial) for trial in dead)

    def counted(self) -> int:
        """Trials that count towards the wanted number: ended ones, and running ones that were not given up.

        Interrupted ones do not: they failed without a reason and were queued again.
        """
        total = 0
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state == TrialState.FAIL:
                total += REASON in trial.user_attrs
            else:
                total += trial.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        return total

    def unsure(self) -> bool:
        """Whether a trial is running of which nobody can tell yet if its process lives: its count tells soon."""
        seen = [self._seen[trial.number] for trial in self._look()]
        return any(not one.moved if one.alive is None else not one.alive for one in seen)

    def _look(self) -> list[FrozenTrial]:
        """The running trials, after a look at each one's worker."""
        running = self._study.get_trials(False, (TrialState.RUNNING,))
        now = self._clock()
        before, self._seen = self._seen, {}
        for trial in running:
            worker = trial.user_attrs.get(WORKER)
            seen = before.get(trial.number) or _Seen(worker, now)
            if worker != seen.worker:
                seen.worker, seen.still, seen.moved = worker, 0.0, True
            else:
                # after a long pause of this process or of the storage, the other one gets time to count again
                seen.still += min(now - seen.at, GRACE_SECONDS / 2)
            seen.at = now
            # between asking for the trial and saying so there is no worker
            seen.alive = None if worker is None else lives(worker)
            self._seen[trial.number] = seen
        return running

    def _dead(self, trial: FrozenTrial) -> bool:
        seen = self._seen[trial.number]
        return seen.alive is False or (seen.alive is None and seen.still >= GRACE_SECONDS)

    def _give_back(self, trial: FrozenTrial) -> bool:
        """Whether it was this process, not another one at the same moment, that took the trial away."""
        try:
            self._study.tell(trial.number, state=TrialState.FAIL)
        except (ValueError, RuntimeError):
            if self._study.get_trials(deepcopy=False)[trial.number].state == TrialState.RUNNING:
                raise
            return False
        # what it had drawn, or was to be tried whatever it drew
        params = trial.params or trial.system_attrs.get("fixed_params", {})
        if params:
            self._study.enqueue_trial(params, skip_if_exists=False)
        return True


def taken(study: optuna.Study, trial: optuna.Trial) -> bool:
    """Whether others gave this process up and ended its trial, which is tried again."""
    return study.get_trials(deepcopy=False)[trial.number].state != TrialState.RUNNING
