"""Figures 13 to 16: the paper's system at every prediction distance, or at every threshold V."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeless.experiments import serving
from moeless.experiments.base import Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import Source, common_kind, common_label, distances, sweep_sources
from moeless.experiments.statements import SMALL, Finding, unanimous
from moeless.metrics.result import Cell
from moeless.placement.paper import PaperParams
from moeless.report import charts

#: Workloads a point stands on at full size, one at quick size; they differ in arrivals and in which requests come.
WORKLOADS = 3
#: Requests of each workload at full size: sweeps have many points.
FULL = 60


@dataclass(frozen=True)
class Sweep:
    """What is varied.

    Attributes:
        points: of a source.
        run: the policy of (source, point), and changes of the workload.
    """

    xlabel: str
    short: str
    points: Callable[[Source], Sequence[float]]
    run: Callable[[Source, Any], tuple[str, dict[str, Any]]]
    whole: bool = False


@dataclass(frozen=True)
class Reading:
    """What is read off each run: a metric; ``relative`` divides by each line's first point."""

    name: str
    ylabel: str
    metric: str
    relative: bool = False


DISTANCE = Sweep(
    "prediction distance d (layers)",
    "d",
    distances,
    lambda source, d: (serving.moeless_policy(source, d), {}),
    whole=True,
)
THRESHOLD = Sweep(
    "threshold V on the coefficient of variation",
    "V",
    lambda _: (0.2, 0.4, 0.6, 0.8, 1.0),
    # the paper's own threshold is the planner's default, whose runs other figures share
    lambda source, v: (
        serving.moeless_policy(source),
        {} if v == PaperParams().cv_threshold else {"planner": {"cv_threshold": v}},
    ),
)
TIME = Reading("Layer time", "mean layer time (ms)", "layer.mean_ms", relative=True)
REPLICAS = Reading("Replicas", "replicas per layer", "layer.replicas")


@dataclass(frozen=True)
class Figure:
    """One figure: a sweep, what is read off it, and the direction that the paper states."""

    number: int
    sweep: Sweep
    reading: Reading
    title: str
    question: str
    stated: str
    rises: bool

    def experiment(self) -> Experiment:
        """The figure as an experiment."""
        title = f"Figure {self.number}: {self.title}"
        return Experiment(f"fig{self.number}", title, self.question, self.stated, self.jobs, self.draw)

    def jobs(self, options: Options) -> Mapping[str, Job]:
        """One run per source, cost model, point and workload."""
        made = {}
        for source in sweep_sources(options):
            for point in self.sweep.points(source):
                policy, changes = self.sweep.run(source, point)
                for costs in options.costs:
                    for seed in _seeds(options):
                        job = serving.job(options, source, policy, costs, seed=seed, **changes)
                        sized = {**job.params, "max_requests": FULL} if options.full else job.params
                        made[_name(source, costs, point, seed)] = replace(job, params=sized)
        return made

    def draw(self, options: Options, results: Mapping[str, Any]) -> Drawn:
        """A line per source."""
        sources, reading = sweep_sources(options), self.reading
        plots: dict[str, Plot] = {}
        rows: list[tuple[list[Any], Cell]] = []
        findings = []
        shown, band = reading.ylabel, f"bands: {serving.PAIRED if reading.relative else serving.BAND}"
        if reading.relative:
            first = " or ".join(dict.fromkeys(str(self.sweep.points(source)[0]) for source in sources))
            shown = f"layer time ÷ that at {self.sweep.short} = {first}"
        if len(_seeds(options)) > 1:
            band = f"mean and range of {WORKLOADS} workloads"
        for costs in options.costs:
            series: dict[str, charts.Line] = {}
            changes = {}
            for source in sources:
                points, seeds = self.sweep.points(source), _seeds(options)
                kept_PS = [[results[_name(source, costs, point, seed)] for seed in seeds] for point in points]
                rows += [
                    ([source.title, costs, point, seed], serving.cell(one))
                    for point, kept_S in zip(points, kept_PS, strict=True)
                    for seed, one in zip(seeds, kept_S, strict=True)
                ]
                value_PS = np.array([[serving.read(one, reading.metric) for one in kept_S] for kept_S in kept_PS])
                changes[source.title] = 100.0 * (float((value_PS[-1] / value_PS[0]).mean()) - 1.0)
                series[source.title] = _line(points, kept_PS, value_PS, reading)
            plots[costs] = Plot(
                charts.lines(
                    series,
                    xlabel=self.sweep.xlabel,
                    ylabel=shown,
                    title=f"{reading.name} over {self.sweep.short}, {costs} costs",
                    ylim=(None, None) if reading.relative else (0, None),
                    reference=1.0 if reading.relative else None,
                    whole_x=self.sweep.whole,
                ),
                f"MoEless on {options.cluster} under {costs} costs "
                f"(n = {serving.fewest_runs(one for _, one in rows):,} layer runs or more a point); {band}.",
                common_kind(sources),
                common_label(sources),
            )
            findings.append(
                Finding(
                    f"{reading.metric}-over-{self.sweep.short}-{costs}",
                    self.stated.rstrip("."),
                    "{costs} costs, first point to last: {each}",
                    changes,
                    unanimous(change >= SMALL if self.rises else change <= -SMALL for change in changes.values()),
                    common_kind(sources),
                    each="{name} {value:change}",
                    metric=reading.metric,
                    costs=costs,
                )
            )
        lead = ("source", "costs", self.sweep.xlabel, "seed")
        data = {"points": serving.table("sweep", lead, rows, "", show=False, evidence=False)}
        return Drawn(plots, data, findings=findings)


def _seeds(options: Options) -> list[int]:
    return [options.seed + order for order in range(options.pick(1, WORKLOADS))]


def _name(source: Source, costs: str, point: float, seed: int) -> str:
    return f"{source.key}|{costs}|{point}|{seed}"


def _line(
    points: Sequence[float], kept_PS: Sequence[Sequence[Mapping[str, Any]]], value_PS: Any, reading: Reading
) -> charts.Line:
    """Mean and range over workloads; of a single workload, its value and its bootstrap interval."""
    if len(kept_PS[0]) == 1:
        # sources differ by orders of magnitude, workloads too: each is compared with itself
        shown_P3 = [
            serving.ratio(kept_S[0], kept_PS[0][0], reading.metric)
            if reading.relative
            else (value, *serving.interval(kept_S[0], reading.metric))
            for kept_S, (value,) in zip(kept_PS, value_PS, strict=True)
        ]
        middle, low, high = zip(*shown_P3, strict=True)
        return charts.Line(points, middle, low, high)
    shown_PS = value_PS / value_PS[0] if reading.relative else value_PS
    return charts.Line(points, shown_PS.mean(1), shown_PS.min(1), shown_PS.max(1))


EXPERIMENTS = tuple(
    figure.experiment()
    for figure in (
        Figure(
            13,
            DISTANCE,
            TIME,
            "layer time against prediction distance",
            "What does looking further ahead cost in time?",
            "Layer time rises with the distance d, 1 to 5.",
            rises=True,
        ),
        Figure(
            14,
            DISTANCE,
            REPLICAS,
            "replicas against prediction distance",
            "How many copies does a layer have when the forecast looks further ahead?",
            "The mean number of replicas per layer falls with the distance d, 1 to 5.",
            rises=False,
        ),
        Figure(
            15,
            THRESHOLD,
            TIME,
            "layer time against the threshold V",
            "What does tolerating more imbalance cost in time?",
            "A larger V (0.2 to 1.0) is slower.",
            rises=True,
        ),
        Figure(
            16,
            THRESHOLD,
            REPLICAS,
            "replicas against the threshold V",
            "How many copies does each threshold need?",
            "A larger V (0.2 to 1.0) needs fewer replicas.",
            rises=False,
        ),
    )
)
