"""Runs jobs: cached ones are read, independent ones run in parallel, each result is kept as soon as it is there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeless.errors import RunFailed
from moeless.experiments.base import Job
from moeless.experiments.cache import Cache, compute, job_key

#: Called with (jobs done, jobs in all, label of the job just done or about to start).
Progress = Callable[[int, int, str], None]


def closure(jobs: Iterable[Job]) -> dict[str, Job]:
    """The jobs and all that they need, by key, each after its needs."""
    ordered: dict[str, Job] = {}

    def visit(job: Job) -> None:
        for need in job.needs:
            visit(need)
        ordered.setdefault(job_key(job), job)

    for job in jobs:
        visit(job)
    return ordered


@dataclass(frozen=True)
class Ran:
    """What a run of jobs did.

    Attributes:
        computed: seconds that each job took, by key.
        cached: how many were read from the cache, or were not needed.
    """

    computed: Mapping[str, float]
    cached: int


def run_jobs(
    jobs: Mapping[str, Job], cache: Cache, *, workers: int = 1, progress: Progress | None = None
) -> tuple[dict[str, Any], Ran]:
    """Results by the names given, and what had to be computed for them.

    An interrupt or a failure keeps every result that was finished; running again continues from there.

    Raises:
        RunFailed: a worker died.
    """
    wanted = closure(jobs.values())
    # a job whose result is kept makes its needs unnecessary, unless the caller asks for them
    pending: dict[str, Job] = {}

    def require(job: Job) -> None:
        key = job_key(job)
        if key in pending or cache.has(job):
            return
        for need in job.needs:
            require(need)
        pending[key] = job

    for job in jobs.values():
        require(job)
    total, done = len(wanted), len(wanted) - len(pending)
    computed: dict[str, float] = {}
    tell = progress or (lambda *_: None)
    tell(done, total, "")
    if pending:

        def told(label: str) -> None:
            tell(done + len(computed), total, label)

        _work(pending, cache, max(1, workers), computed, told)
    return {name: cache.read(job) for name, job in jobs.items()}, Ran(computed, done)


def _work(
    pending: Mapping[str, Job], cache: Cache, workers: int, computed: dict[str, float], tell: Callable[[str], None]
) -> None:
    """Run every pending job in worker processes: a result has the same bytes whatever else ran."""
    waiting = dict(pending)
    running: dict[Future[Any], str] = {}
    with processes(min(workers, len(pending)), "a worker process") as pool:
        while waiting or running:
            for key in _startable(waiting, {*waiting, *running.values()}, workers - len(running)):
                job = waiting.pop(key)
                folder = cache.folder(job) if job.artefact else None
                tell(job.label)
                needs = [cache.read(need) for need in job.needs]
                running[pool.submit(_timed, job, needs, folder)] = key
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                data, seconds = future.result()
                cache.write(pending[key], data)
                computed[key] = seconds
                tell(pending[key].label)


@contextmanager
def processes(count: int, what: str) -> Iterator[ProcessPoolExecutor]:
    """Worker processes of one thread each; an error or an interrupt ends those that still work.

    Raises:
        RunFailed: a process died.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_quiet_worker)
    try:
        yield pool
    except BaseException as error:
        # finished results are on disk; what still runs is abandoned
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise RunFailed(f"{what} died, most likely for lack of memory; try --jobs 1") from error
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _timed(job: Job, needs: list[Any], folder: Path | None) -> tuple[Any, float]:
    started = time.perf_counter()
    return compute(job, needs, folder), time.perf_counter() - started


def _startable(waiting: Mapping[str, Job], unfinished: Set[str], free: int) -> list[str]:
    """Jobs to start now: their needs are there; a timed one starts last and alone, so that nothing disturbs it."""
    ready = [key for key, job in waiting.items() if not any(job_key(need) in unfinished for need in job.needs)]
    untimed = [key for key in ready if not waiting[key].timed]
    if untimed or len(unfinished) > len(waiting):
        return untimed[: max(0, free)]
    return ready[:1]


def _quiet_worker() -> None:
    """Interrupts are the parent's to handle; one thread per worker; nobody works for a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
