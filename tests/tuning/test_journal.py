"""A journal can be shared by people and machines, and outlives a writer that was killed."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from moeless.errors import UserError
from moeless.tuning import Tuning, journal, storage

Make = Callable[..., Tuning]


def begin(where: str, trials: int = 1) -> optuna.Study:
    """A study of a few trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=storage.open_storage(where), study_name="s", load_if_exists=True)
    for _ in range(trials):
        trial = study.ask()
        study.tell(trial, trial.suggest_float("x", 0, 1))
    return study


@pytest.fixture
def umask_for_a_group() -> object:
    before = os.umask(0o002)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask_for_a_group")
def test_what_a_study_writes_is_open_to_the_group_where_the_umask_says_so(tmp_path: Path):
    begin(str(tmp_path / "studies" / "s.journal"))
    files = list((tmp_path / "studies").iterdir())
    assert files
    for file in files:
        assert file.stat().st_mode & 0o777 == 0o664


@pytest.mark.parametrize(
    ("kind", "lock"),
    [
        *((kind, "kernel") for kind in ("ext4", "overlay", "tmpfs", "xfs")),
        *((kind, "file") for kind in ("nfs", "nfs4", "lustre", "cifs", "fuse.sshfs", "virtiofs", "gpfs", "")),
    ],
)
def test_the_file_system_decides_on_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lock: str):
    monkeypatch.setattr(journal, "file_system", lambda _: kind)
    path = tmp_path / "s.journal"
    begin(str(path))
    held = journal.open_journal(str(path))._lock  # type: ignore[attr-defined]
    held.acquire()
    try:
        with path.open() as other:
            if lock == "kernel":
                with pytest.raises(BlockingIOError):
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the name that Optuna's own tools use for a journal
            assert (tmp_path / "s.journal.lock").exists() == (lock == "file")
    finally:
        held.release()
    assert [file.name for file in tmp_path.iterdir()] == ["s.journal"]


def test_the_address_may_name_the_lock(tmp_path: Path):
    path = tmp_path / "s.journal"
    for kind, expected in (("kernel", journal.KernelLock), ("file", journal.JournalFileOpenLock)):
        where = f"{path}?lock={kind}"
        assert len(begin(where).trials)
        assert isinstance(journal.open_journal(where)._lock.lock, expected)  # type: ignore[attr-defined]
    assert len(begin(str(path), 0).trials) == 2
    with pytest.raises(UserError, match="no lock of a journal is called 'flock'; there are: kernel, file"):
        begin(f"{path}?lock=flock")


def test_links_to_one_journal_lead_to_one_lock(tmp_path: Path):
    (tmp_path / "mine").symlink_to(tmp_path / "s.journal")
    held = journal.open_journal(f"{tmp_path / 'mine'}?lock=file")._lock  # type: ignore[attr-defined]
    held.acquire()
    assert (tmp_path / "s.journal.lock").exists()
    held.release()


def _three_trials(tuning: Tuning) -> None:
    tuning.run(tuning.open())
    os._exit(0)


@pytest.mark.parametrize("zeros", [False, True])
def test_a_line_that_a_killed_writer_left_unfinished_is_dropped_and_the_study_goes_on(
    tuning_for: Make, tmp_path: Path, zeros: bool
):
    child = multiprocessing.get_context("fork").Process(target=_three_trials, args=(tuning_for(trials=3),))
    child.start()
    child.join(120)
    path = tmp_path / "studies.journal"
    lines = path.read_bytes().splitlines(keepends=True)
    # the last one says that the third trial is complete
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:-37] + (b"\0" * 500 if zeros else b""))
    tuning = tuning_for()
    study = tuning.open()
    tuning.run(study)
    states = [trial.state for trial in study.trials]
    assert (states.count(TrialState.COMPLETE), states.count(TrialState.FAIL), len(states)) == (6, 1, 7)
    assert study.trials[3].params == study.trials[2].params
    # whoever opens it next can read it
    assert len(tuning_for().open().trials) == 7


@pytest.mark.parametrize("content", [b"my notes", b"my\nnotes", b"{}\n{"])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, content: bytes):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="storage"), storage._sentences(str(path)):
        begin(str(path))
    assert path.read_bytes() == content
