"""Ranks are forked from a process of its own that has one thread, and end with the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moeless.engine.forkserver import ForkServer
from moeless.engine.job import Job
from moeless.errors import RunFailed, UserError


@pytest.fixture
def own_server(start_server: Callable[[], ForkServer]) -> Iterator[ForkServer]:
    """A process that a test may end."""
    with start_server() as started:
        yield started


def ends(pid: int) -> None:
    """Wait until a process is gone."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            # its new parent has not asked for it
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} still runs")


def started(folder: Path, ranks: int) -> list[int]:
    """Process ids of ranks of ``forked_work:hanging`` once all of them run."""
    deadline = time.monotonic() + 60
    while len(found := sorted(folder.glob("*.pid"))) < ranks:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [int(path.read_text()) for path in found]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_that_forks_has_one_thread_after_imports_and_warm_up(
    server: ForkServer, make_job: Callable[..., Job], tmp_path: Path
) -> None:
    job = make_job(policies=("elastic:history", "moeless:history"))
    job.write(tmp_path / "job.json")
    server.run("forked_work:counting_threads", {"job": str(tmp_path / "job.json"), "folder": str(tmp_path)}, 2)
    assert [(tmp_path / f"threads-{rank}").read_text() for rank in range(2)] == ["1", "1"]


def test_work_that_is_kept_in_one_thread_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from moeless.placement import threads

    monkeypatch.setattr(threads, "COMPILED", True)
    monkeypatch.setattr(threads, "cores", lambda: 4)
    ran: list[tuple[int, int, int]] = []
    with threads.alone():
        threads.in_parallel(lambda start, stop: ran.append((start, stop, threading.get_ident())), 8, 10**9)
    assert ran == [(0, 8, threading.get_ident())]
    threads.in_parallel(lambda start, stop: ran.append((start, stop, threading.get_ident())), 8, 10**9)
    assert len(ran) == 5


def test_a_rank_s_end_is_told_in_a_sentence_and_the_process_serves_on(server: ForkServer) -> None:
    with pytest.raises(RunFailed, match=r"^rank 1 was killed by SIGBUS \(.*/dev/shm.* found no room\); the run was"):
        server.run("forked_work:killed", None, 2)
    with pytest.raises(UserError, match=r"^no such host$"):
        server.run("forked_work:refusing", "no such host", 1)
    with pytest.raises(RunFailed, match=r"^the ranks cannot be started: ZeroDivisionError: division by zero$"):
        server.run("forked_work:broken", None, 1)


def test_an_interrupt_is_the_command_s_alone_and_ends_the_ranks(
    own_server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[int] = []

    def interrupted() -> str:
        pids.extend(started(tmp_path, 2))
        # the terminal interrupts the other processes too
        for pid in (own_server._process.pid, *pids):
            os.kill(pid, signal.SIGINT)
            os.kill(pid, 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(own_server._answers, "readline", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        own_server.run("forked_work:hanging", str(tmp_path), 2)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    # told to end, not killed
    assert own_server._process.returncode == 0


def test_told_to_end_within_a_fork_it_ends_and_leaves_no_rank(own_server: ForkServer, tmp_path: Path) -> None:
    # what a handler raises within a fork is lost: there the signal must wait
    with pytest.raises(RunFailed, match="ended with exit status 0"):
        own_server.run("forked_work:ended_within_a_fork", str(tmp_path), 2)
    for path in tmp_path.glob("*.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.stem), 0)


def test_a_killed_server_is_a_sentence(own_server: ForkServer, tmp_path: Path) -> None:
    def kill() -> None:
        started(tmp_path, 1)
        os.kill(own_server._process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RunFailed, match="the process that starts the ranks was killed by SIGKILL"):
        own_server.run("forked_work:hanging", str(tmp_path), 1)
    killer.join()
    ends(int((tmp_path / "0.pid").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends them")
def test_ranks_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from moeless.engine.forkserver import ForkServer\n"
        f"ForkServer().run('forked_work:hanging', {str(tmp_path)!r}, 2)\n"
    )
    command = subprocess.Popen([sys.executable, "-c", code])
    pids = started(tmp_path, 2)
    command.kill()
    command.wait()
    for pid in pids:
        ends(pid)
