"""Starting a job's ranks: forked, under ``torchrun``, or as the rank that torchrun made of this process."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

from moeless.engine.hosts import HOSTS
from moeless.engine.job import Job
from moeless.engine.launch import raise_failure, run_forked
from moeless.engine.torchrun import Place, failures, run_torchrun

LAUNCHERS = ("auto", "fork", "torchrun")


def serve_at(job: Job, at: Place) -> None:
    from moeless.engine import worker

    try:
        worker.serve_at(job, at)
    except Exception:
        failed = failures(job.folder, "")
        if failed and at.rank == 0:
            raise_failure(failed)
        raise
    finally:
        with contextlib.suppress(OSError):
            # the last rank of a machine to leave removes it
            job.shared.rmdir()


def launch(job: Job, launcher: str = "auto") -> None:
    """Run a job's ranks on this machine, forked or under ``torchrun``; ``auto`` forks on CPUs.

    Raises:
        UserError, RunFailed: see :mod:`moeless.engine.launch`.
    """
    if launcher == "torchrun" or (launcher == "auto" and job.device == "cuda"):
        job.write(job.folder / "job.json")
        run_torchrun(job.folder / "job.json", job.ranks)
        return
    # what the ranks need is imported once, before they are forked
    import transformers  # noqa: F401

    from moeless.engine import groups, worker

    HOSTS.get(job.host)
    # compiled here, the planners' kernels need not be compiled by every rank
    for policy in worker.policies_of(job):
        policy.warm_up()
    init = f"file://{job.folder / 'rendezvous'}"

    def work(rank: int) -> None:
        ranks = groups.join(rank, job.ranks, init_method=init, timeout_seconds=job.timeout_seconds)
        worker.serve(job, ranks)
        groups.leave()

    run_forked(work, job.ranks)


def shared_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder in the machine's memory file system, or among temporary files where there is none."""
    return tempfile.TemporaryDirectory(prefix="moeless-", dir=memory_folder())


def memory_folder() -> Path:
    memory = Path("/dev/shm")
    usable = memory.is_dir() and shutil.disk_usage(memory).free > 0
    return memory if usable else Path(tempfile.gettempdir())
