"""Studies on storage that several processes share, continued where they stopped."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from moeless.errors import UserError
from moeless.files import check_writable

#: Attribute of a study that says what it tunes, of a trial that says who runs it, of a failed one that says why.
SETTINGS, WORKER, REASON = "settings", "worker", "reason"
#: Seconds within which whoever asked for a trial has signed it, unless it was killed in between.
SIGNING_SECONDS = 10.0


class ProcessLock:
    """A journal's lock that the kernel lets go when its process dies.

    Optuna's own locks are files that a killed process leaves behind; the next one waits half a minute for them.
    ``flock`` also works between machines on NFS.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = -1

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._handle = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        """Let it go."""
        os.close(self._handle)


def open_storage(where: str) -> optuna.storages.BaseStorage:
    """A journal file (made where it is missing), or any database that SQLAlchemy reaches by its URL.

    Raises:
        UserError: the file cannot be written or is no journal, or the database cannot be reached.
    """
    with _sentences(where):
        if "://" in where:
            return optuna.storages.RDBStorage(where)
        path = Path(where).expanduser()
        if path.is_dir():
            raise UserError(f"the study's storage {path} is a folder; name a file, or a database URL")
        check_writable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock: Any = ProcessLock(path.with_name(f"{path.name}.lock"))
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path), lock))


@contextmanager
def _sentences(where: str) -> Iterator[None]:
    """Drivers, SQLAlchemy and journals fail with errors of their own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        # a URL may hold a password
        shown = where.rpartition("@")[2]
        raise UserError(
            f"cannot open the study's storage {shown} ({reason}); name a journal file or a database URL"
        ) from error


def open_study(
    where: str,
    name: str,
    directions: Sequence[str],
    settings: Mapping[str, Any],
    sampler: optuna.samplers.BaseSampler,
    pruner: optuna.pruners.BasePruner,
) -> optuna.Study:
    """Create the study, or go on with the one of that name.

    Raises:
        UserError: the storage cannot be opened, or the existing study tunes something else.
    """
    storage = open_storage(where)
    with _sentences(where):
        known = {study.study_name: study for study in optuna.get_all_study_summaries(storage)}
        if name in known and SETTINGS in known[name].user_attrs:
            _same(name, known[name].user_attrs[SETTINGS], settings)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=list(directions),
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )
        study.set_user_attr(SETTINGS, dict(settings))
    return study


def _same(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for key in sorted({*theirs, *ours}):
        if theirs.get(key) != ours.get(key):
            raise UserError(
                f"study {name!r} was begun with {key} {theirs.get(key)!r}, now it is {ours.get(key)!r}; "
                "choose another --study, or give the same options"
            )


def sign(trial: optuna.Trial) -> None:
    """Note who runs a trial, so that others can tell when its process is gone."""
    trial.set_user_attr(WORKER, {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())})


def alive(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a running trial's process may still be at work; on another machine it is taken to be."""
    worker = trial.user_attrs.get(WORKER)
    if worker is None:
        # between asking and signing, or killed there
        return datetime.now() - (trial.datetime_start or datetime.min) < timedelta(seconds=SIGNING_SECONDS)
    return worker["host"] != socket.gethostname() or _born(worker["pid"]) == worker["born"]


def unsigned(study: optuna.Study) -> bool:
    """Whether a trial runs of which nobody can say yet who runs it: soon it is signed, or taken for dead."""
    return any(WORKER not in trial.user_attrs for trial in study.get_trials(False, (TrialState.RUNNING,)))


def _born(pid: int) -> str | None:
    """What tells a process from a later one of the same number; None where there is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    # a killed process that nobody has waited for is still listed
    return None if fields[0] == "Z" else fields[19]


def reap(study: optuna.Study) -> int:
    """Fail the trials of dead processes and queue their parameters again; returns how many."""
    dead = [trial for trial in study.get_trials(False, (TrialState.RUNNING,)) if not alive(trial)]
    for trial in dead:
        # another process may do the same at this moment
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        # what it had drawn, or was to be tried whatever it drew
        params = trial.params or trial.system_attrs.get("fixed_params", {})
        if params:
            study.enqueue_trial(params, skip_if_exists=False)
    return len(dead)


def counted(study: optuna.Study) -> int:
    """Trials that count towards the wanted number: ended ones, and those of other live processes.

    Interrupted ones do not: they failed without a reason and were queued again.
    """
    total = 0
    for trial in study.get_trials(deepcopy=False):
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            total += 1
        elif trial.state == TrialState.FAIL:
            total += REASON in trial.user_attrs
        elif trial.state == TrialState.RUNNING:
            total += alive(trial)
    return total
