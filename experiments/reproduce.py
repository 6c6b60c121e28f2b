"""Runs experiments into one run folder: all their work first, each result once, then the drawing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeless.cluster import cluster
from moeless.costs import COSTS
from moeless.errors import UserError
from moeless.experiments import live, timing
from moeless.experiments.base import Experiment, Options
from moeless.experiments.cache import Cache
from moeless.experiments.catalogue import find
from moeless.experiments.publish import RECORD, Publisher, drawn_in_turn
from moeless.experiments.runner import Progress, closure, run_jobs
from moeless.experiments.sources import given
from moeless.files import check_writable, read_json
from moeless.report.result_page import BILLS
from moeless.spec import preset
from moeless.tracking import start_run


@dataclass(frozen=True)
class Reproduction:
    """What will be run: checked options, experiments, cache; and in sentences, what cannot be."""

    what: str
    options: Options
    experiments: list[Experiment]
    cache: Cache
    left_out: tuple[str, ...] = ()

    def config(self) -> dict[str, Any]:
        """The resolved configuration, JSON-ready."""
        options = self.options
        return {
            "what": self.what,
            "experiments": [experiment.name for experiment in self.experiments],
            "size": "full" if options.full else "quick",
            "models": list(options.models),
            "traces": [str(path) for path in options.traces],
            "beside": options.beside,
            "live": None if options.live is None else str(options.live),
            "cluster": options.cluster,
            "costs": list(options.costs),
            "billing": options.billing,
            "seed": options.seed,
            "cache": str(self.cache.root),
        }

    def estimate(self, workers: int = 2) -> dict[str, Any]:
        """How many jobs there are, how many of them the cache holds, and how long the others will take."""
        every: dict[str, Any] = {}
        for experiment in self.experiments:
            every |= closure(experiment.jobs(self.options).values())
        missing = [job for job in every.values() if not self.cache.has(job)]
        return {
            "jobs": len(every),
            "cached": len(every) - len(missing),
            **timing.plan(missing, workers),
            "memory": f"below {4 if self.options.full else 2} GiB per process",
        }

    def run(
        self, *, out: Path | None, wandb: bool | None, workers: int, progress: Progress | None = None
    ) -> tuple[Path, dict[str, Any]]:
        """Run every experiment; returns the page's path and the record.

        Raises:
            RunFailed: a worker died or the disk is full; what was finished is kept in the cache.
        """
        inputs = [*self.options.traces, *([] if self.options.live is None else [self.options.live / "result.json"])]
        with start_run("reproduce", self.what, self.config(), self.options.seed, inputs, out, wandb) as run:
            publisher = Publisher(run, self.options)
            jobs = {experiment.name: experiment.jobs(self.options) for experiment in self.experiments}
            every = {f"{name} {short}": job for name, mine in jobs.items() for short, job in mine.items()}
            results, ran = run_jobs(every, self.cache, workers=workers, progress=progress)
            shown = {name: {short: results[f"{name} {short}"] for short in mine} for name, mine in jobs.items()}
            drawn_in = drawn_in_turn(list(jobs), self.options, shown, run.path / "figures", workers)
            told: set[str] = set()
            for experiment, drawn in zip(self.experiments, drawn_in, strict=True):
                # what several experiments need counts where it is first needed
                fresh = closure(jobs[experiment.name].values()).keys() - told
                told |= fresh
                publisher.add(experiment, drawn, [ran.computed.get(key) for key in fresh])
            for problem in (*self.left_out, *self.cache.problems):
                run.warn(problem)
            page = publisher.finish()
            return page, read_json(run.path / RECORD)


def prepare(what: str, options: Options, cache: Path) -> Reproduction:
    """Check a request.

    Raises:
        UserError: an experiment, model, cluster, cost model, bill or trace is not there, or nothing can be written.
    """
    experiments = find(what)
    for name in options.models:
        preset(name)
    cluster(options.cluster)
    for name in options.costs:
        COSTS.get(name)
    if options.billing not in BILLS:
        raise UserError(f"--billing is {options.billing!r}, it must be one of {', '.join(BILLS)}")
    if options.beside and not options.traces:
        raise UserError("--beside puts your traces next to the default sources; name one with --trace")
    given(options)
    if options.live is not None:
        live.check(options.live)
    experiments, left_out = _possible(what, options, experiments)
    check_writable(cache)
    return Reproduction(what, options, experiments, Cache(cache), left_out)


def _possible(what: str, options: Options, experiments: list[Experiment]) -> tuple[list[Experiment], tuple[str, ...]]:
    """Leave out what cannot be drawn from what is given; refuse one asked for by name."""
    lacking = {experiment.name: experiment.lacks(options) for experiment in experiments}
    sentences = tuple(f"{name} is left out: {sentence}" for name, sentence in lacking.items() if sentence)
    if what != "all" and sentences:
        raise UserError(f"{what} cannot be drawn: {lacking[what]}")
    return [experiment for experiment in experiments if not lacking[experiment.name]], sentences
