"""Starting a job's ranks: forked, under ``torchrun``, or as the rank that torchrun made of this process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from moeless.engine.forkserver import ForkServer
from moeless.engine.hosts import HOSTS
from moeless.engine.job import Job
from moeless.engine.launch import raise_failure
from moeless.engine.torchrun import Place, failures, run_torchrun


def serve_at(job: Job, at: Place) -> None:
    """Be a rank of a torchrun launch.

    Raises:
        UserError, RunFailed: see :mod:`moeless.engine.launch`.
    """
    from moeless.engine import worker

    try:
        worker.serve_at(job, at)
    except Exception:
        failed = failures(job.folder, "")
        if failed and at.rank == 0:
            raise_failure(failed)
        raise


def by_torchrun(device: str, launcher: str) -> bool:
    """Whether a launcher's name means torchrun on this kind of device; ``auto`` forks on CPUs."""
    return launcher == "torchrun" or (launcher == "auto" and device == "cuda")


def launch(job: Job, launcher: str = "auto", server: ForkServer | None = None) -> None:
    """Run a job's ranks on this machine, forked or under ``torchrun``; ``auto`` forks on CPUs.

    Args:
        server: forks the ranks; None starts one for this job alone.

    Raises:
        UserError, RunFailed: see :mod:`moeless.engine.launch`.
    """
    path = job.folder / "job.json"
    job.write(path)
    if by_torchrun(job.device, launcher):
        run_torchrun(path, job.ranks)
    elif server is not None:
        server.run("moeless.engine.start:ranks_of", str(path), job.ranks)
    else:
        with ForkServer() as server:
            server.run("moeless.engine.start:ranks_of", str(path), job.ranks)


def _import_family(model: Path) -> None:
    """Import what Transformers has of a model's family; where it has nothing, the ranks will say so."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with contextlib.suppress(Exception):
        config = AutoConfig.from_pretrained(model)
        for part in (config, config.get_text_config()):
            with contextlib.suppress(KeyError):
                AutoModelForCausalLM._model_mapping[type(part)]


def ranks_of(path: str) -> Callable[[int], None]:
    """What each forked rank of a job file does; what they need is imported and compiled here, once."""
    from moeless.engine import groups, worker
    from moeless.placement.threads import alone

    job = Job.read(Path(path))
    HOSTS.get(job.host)
    _import_family(job.model)
    with alone():
        for policy in worker.policies_of(job):
            policy.warm_up()
    meeting = groups.Meeting()

    def work(rank: int) -> None:
        ranks = groups.join(rank, job.ranks, meeting=meeting, timeout_seconds=job.timeout_seconds)
        worker.serve(job, ranks)
        groups.leave()

    return work
