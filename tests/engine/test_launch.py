"""A rank that fails ends the run with one sentence that names it, and nothing is left running."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from moeless.engine.launch import ForkedRanks, describe, run_forked
from moeless.errors import RunFailed, UserError


def hang(_rank: int = 0) -> None:
    threading.Event().wait(600)


def test_ranks_that_end_well_end_the_run() -> None:
    run_forked(lambda _: None, 3)


def test_a_killed_rank_is_named_and_the_others_are_ended() -> None:
    ranks = ForkedRanks(lambda rank: os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else hang(), 3)
    pids = list(ranks.pids.values())
    with pytest.raises(RunFailed, match="rank 1 was killed by SIGKILL"):
        ranks.wait()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_cause_is_named_not_the_rank_that_noticed_first() -> None:
    reading, writing = os.pipe()

    def work(rank: int) -> None:
        if rank == 0:
            os.write(writing, b"x")
            raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1")
        os.read(reading, 1)
        raise RunFailed("expert 3 of layer 0 cannot be loaded: out of memory")

    with pytest.raises(RunFailed, match="rank 1 failed: expert 3 of layer 0"):
        run_forked(work, 2)
    os.close(reading)
    os.close(writing)


def test_a_refusal_stays_a_refusal() -> None:
    def work(rank: int) -> None:
        raise UserError("no such model")

    with pytest.raises(UserError, match=r"^no such model$"):
        run_forked(work, 2)


def test_a_bug_is_one_sentence_with_its_rank() -> None:
    def work(rank: int) -> None:
        if rank == 2:
            raise ZeroDivisionError("division by zero\nsecond line")
        hang()

    with pytest.raises(RunFailed, match=r"^rank 2 failed: ZeroDivisionError: division by zero$"):
        run_forked(work, 3)


def test_an_exception_of_the_waiting_parent_ends_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ForkedRanks(hang, 2)
    pids = list(ranks.pids.values())

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks, "_reap", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ranks.wait()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("a"), "user"),
        (RunFailed("a"), "run"),
        (RuntimeError("[../gloo] Connection closed by peer"), "peer"),
        (RuntimeError("shape mismatch"), "crash"),
    ],
)
def test_reports_tell_causes_from_consequences(error: Exception, kind: str) -> None:
    assert describe(error).kind == kind
