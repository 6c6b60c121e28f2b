"""What the figures over distance and over the threshold V share: one run of the paper's system per point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moeless.experiments import serving
from moeless.experiments.base import Data, Drawn, Job, Options, Plot
from moeless.experiments.sources import Source, common_kind, common_label, sweep_sources
from moeless.metrics.result import Cell
from moeless.report import line_figures

DISTANCES = (1, 2, 3, 4, 5)
THRESHOLDS = (0.2, 0.4, 0.6, 0.8, 1.0)


def distance_jobs(options: Options) -> Mapping[str, Job]:
    """The paper's system at every prediction distance."""
    return {
        f"{source.key}|{costs}|{d}": serving.job(options, source, serving.moeless_policy(source, d), costs)
        for source in sweep_sources(options)
        for costs in options.costs
        for d in DISTANCES
    }


def threshold_jobs(options: Options) -> Mapping[str, Job]:
    """The paper's system at every threshold on the coefficient of variation."""
    return {
        f"{source.key}|{costs}|{v}": serving.job(
            options, source, serving.moeless_policy(source), costs, planner={"cv_threshold": v}
        )
        for source in sweep_sources(options)
        for costs in options.costs
        for v in THRESHOLDS
    }


def draw(
    options: Options,
    results: Mapping[str, Any],
    points: Sequence[float],
    value: Callable[[Cell], float],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    relative: bool = False,
) -> Drawn:
    """One figure per cost model, one line per source; ``relative`` divides by each line's first point."""
    sources = sweep_sources(options)
    plots: dict[str, Plot] = {}
    rows: list[list[Any]] = []
    text = []
    shown_label = f"{ylabel.partition(' (')[0]} ÷ that at {points[0]}" if relative else ylabel
    for costs in options.costs:
        series: dict[str, line_figures.Line] = {}
        for source in sources:
            found = [serving.cell(results[f"{source.key}|{costs}|{point}"]) for point in points]
            y = [value(one) for one in found]
            # sources differ by orders of magnitude; the change is what the figure is about
            shown = [each / y[0] if relative and y[0] else each for each in y]
            series[source.title] = line_figures.Line(points, shown)
            rows += [
                [
                    source.title,
                    costs,
                    point,
                    one.layer.mean_ms,
                    one.layer.replicas,
                    one.layer.warm_rate,
                    one.layer.samples,
                ]
                for point, one in zip(points, found, strict=True)
            ]
            text.append(_trend(source, costs, points, y, ylabel))
        plots[costs] = Plot(
            line_figures.lines(
                series, xlabel=xlabel, ylabel=shown_label, title=f"{title}, {costs} costs", ylim=(0, None)
            ),
            f"{title}: MoEless on {options.cluster} under {costs} costs, one run per point "
            f"(n = {min(row[-1] for row in rows):,} layer runs or more).",
            common_kind(sources),
            common_label(sources),
        )
    columns = ["source", "costs", xlabel, "mean layer (ms)", "replicas per layer", "warm rate", "layer runs"]
    return Drawn(plots, {"points": Data(columns, rows)}, text=text)


def _trend(source: Source, costs: str, points: Sequence[float], y: Sequence[float], what: str) -> str:
    change = 100.0 * (y[-1] / y[0] - 1.0) if y[0] else 0.0
    return f"{source.title}, {costs} costs: {what} changes by {change:+.1f} % from {points[0]} to {points[-1]}."
