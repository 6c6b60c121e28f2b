"""What Figures 13 to 16 share: the paper's system at every prediction distance, or at every threshold V."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from moeless.experiments import serving
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import Source, common_kind, common_label, distances, sweep_sources
from moeless.experiments.statements import SMALL, Finding, unanimous
from moeless.metrics.result import Cell
from moeless.placement.paper import PaperParams
from moeless.report import line_figures

#: Workloads a point stands on at full size, one at quick size; they differ in arrivals and in which requests come.
WORKLOADS = 3
#: Requests of each workload at full size.
FULL = 60


@dataclass(frozen=True)
class Sweep:
    """What is varied.

    Attributes:
        points: of a source.
        job: the run of (options, source, cost model, point, seed).
    """

    xlabel: str
    short: str
    points: Callable[[Source], Sequence[float]]
    job: Callable[[Options, Source, str, Any, int], Job]
    whole: bool = False


@dataclass(frozen=True)
class Reading:
    """What is read off each run: a field of the result, and what its blocks call it; ``relative`` divides by each
    line's first point."""

    ylabel: str
    field: str
    what: Literal["seconds", "replicas"]
    relative: bool = False


DISTANCE = Sweep(
    "prediction distance d (layers)",
    "d",
    distances,
    lambda options, source, costs, d, seed: serving.job(
        options, source, serving.moeless_policy(source, d), costs, seed=seed
    ),
    whole=True,
)
THRESHOLD = Sweep(
    "threshold V on the coefficient of variation",
    "V",
    lambda _: (0.2, 0.4, 0.6, 0.8, 1.0),
    lambda options, source, costs, v, seed: serving.job(
        options,
        source,
        serving.moeless_policy(source),
        costs,
        seed=seed,
        # the paper's own threshold is the planner's default, whose runs other figures share
        **({} if v == PaperParams().cv_threshold else {"planner": {"cv_threshold": v}}),
    ),
)
TIME = Reading("mean layer time (ms)", "layer.mean_ms", "seconds", relative=True)
REPLICAS = Reading("replicas per layer", "layer.replicas", "replicas")


def experiment(
    number: int, sweep: Sweep, reading: Reading, *, title: str, question: str, stated: str, rises: bool
) -> Experiment:
    """One figure: a sweep and what is read off it; ``rises`` is the direction that the paper states."""

    def jobs(options: Options) -> Mapping[str, Job]:
        return {
            _name(source, costs, point, seed): _sized(options, sweep.job(options, source, costs, point, seed))
            for source in sweep_sources(options)
            for costs in options.costs
            for point in sweep.points(source)
            for seed in _seeds(options)
        }

    def draw(options: Options, results: Mapping[str, Any]) -> Drawn:
        return _draw(options, results, sweep, reading, title, Stated(stated, rises))

    name = f"fig{number}"
    return Experiment(name, f"Figure {number}: {title}", question, stated, jobs, draw)


@dataclass(frozen=True)
class Stated:
    """The paper's statement and its direction."""

    text: str
    rises: bool


def _sized(options: Options, job: Job) -> Job:
    """Full sweeps have many points: each takes fewer requests than the other figures' runs."""
    return replace(job, params={**job.params, "max_requests": FULL}) if options.full else job


def _seeds(options: Options) -> list[int]:
    return [options.seed + order for order in range(options.pick(1, WORKLOADS))]


def _name(source: Source, costs: str, point: float, seed: int) -> str:
    return f"{source.key}|{costs}|{point}|{seed}"


def _draw(
    options: Options, results: Mapping[str, Any], sweep: Sweep, reading: Reading, title: str, stated: Stated
) -> Drawn:
    sources = sweep_sources(options)
    plots: dict[str, Plot] = {}
    rows: list[list[Any]] = []
    findings = []
    shown = reading.ylabel
    if reading.relative:
        first = " or ".join(dict.fromkeys(str(sweep.points(source)[0]) for source in sources))
        shown = f"layer time ÷ that at {sweep.short} = {first}"
    for costs in options.costs:
        series: dict[str, line_figures.Line] = {}
        changes = {}
        for source in sources:
            points = sweep.points(source)
            kept_PS = [[results[_name(source, costs, point, seed)] for seed in _seeds(options)] for point in points]
            rows += [
                [source.title, costs, point, seed, *_figures(serving.cell(one))]
                for point, kept_S in zip(points, kept_PS, strict=True)
                for seed, one in zip(_seeds(options), kept_S, strict=True)
            ]
            value_PS = np.array([[serving.read(one, reading.field) for one in kept_S] for kept_S in kept_PS])
            changes[source.title] = 100.0 * (float((value_PS[-1] / value_PS[0]).mean()) - 1.0)
            series[source.title] = _line(points, kept_PS, reading)
        plots[costs] = Plot(
            line_figures.lines(
                series,
                xlabel=sweep.xlabel,
                ylabel=shown,
                title=f"{'Layer time' if reading.relative else 'Replicas'} over {sweep.short}, {costs} costs",
                ylim=(None, None) if reading.relative else (0, None),
                reference=1.0 if reading.relative else None,
                whole_x=sweep.whole,
            ),
            f"MoEless on {options.cluster} under {costs} costs (n = {min(row[-1] for row in rows):,} layer runs or "
            f"more a point); {_band(options, reading)}.",
            common_kind(sources),
            common_label(sources),
        )
        findings.append(
            Finding(
                f"{reading.field}-over-{sweep.short}-{costs}",
                stated.text.rstrip("."),
                "{costs} costs, first point to last: {each}",
                changes,
                # every source's change has the stated sign
                unanimous(change >= SMALL if stated.rises else change <= -SMALL for change in changes.values()),
                common_kind(sources),
                each="{name} {value:change}",
                metric=reading.field,
                costs=costs,
            )
        )
    columns = ["source", "costs", sweep.xlabel, "seed", "mean layer (ms)", "replicas per layer", "warm rate"]
    return Drawn(plots, {"points": Data([*columns, "layer runs"], rows)}, findings=findings)


def _line(
    points: Sequence[float], kept_PS: Sequence[Sequence[Mapping[str, Any]]], reading: Reading
) -> line_figures.Line:
    """Mean and range over workloads; of a single workload, its value and its bootstrap interval."""
    if len(kept_PS[0]) == 1:
        # sources differ by orders of magnitude, workloads too: each is compared with itself
        shown_P3 = [
            serving.ratio(kept_S[0], kept_PS[0][0], reading.what)
            if reading.relative
            else (serving.read(kept_S[0], reading.field), *serving.interval(kept_S[0], reading.field))
            for kept_S in kept_PS
        ]
        middle, low, high = zip(*shown_P3, strict=True)
        return line_figures.Line(points, middle, low, high)
    value_PS = np.array([[serving.read(one, reading.field) for one in kept_S] for kept_S in kept_PS])
    shown_PS = value_PS / value_PS[0] if reading.relative else value_PS
    return line_figures.Line(points, shown_PS.mean(1), shown_PS.min(1), shown_PS.max(1))


def _band(options: Options, reading: Reading) -> str:
    if len(_seeds(options)) > 1:
        return f"mean and range of {WORKLOADS} workloads"
    return f"bands: {serving.PAIRED if reading.relative else serving.BAND}"


def _figures(one: Cell) -> list[float]:
    return [one.layer.mean_ms, one.layer.replicas, one.layer.warm_rate, one.layer.samples]
