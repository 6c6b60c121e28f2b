"""End-to-end latency: what a user waits, under each policy, which the paper does not report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments import serving
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import Source, common_kind, common_label
from moeless.metrics.requests import WAITS
from moeless.report import style
from moeless.report.charts import policy_bars

#: Loose enough for eight A6000; the rate is what they serve without a growing queue.
RATE = 4.0
COLUMNS = ("source", "costs", "policy", "metric", "mean (ms)", "low", "high", "median (ms)", "p99 (ms)", "requests")


def _policies(source: Source) -> tuple[str, ...]:
    mine = serving.moeless_policy(source)
    return ("static", "eplb:history", mine, mine.replace("moeless", "elastic", 1), "oracle")


def _jobs(options: Options) -> Mapping[str, Job]:
    return {
        f"{source.key}|{costs}|{policy}": serving.job(
            options,
            source,
            policy,
            costs,
            **serving.CONTINUOUS,
            request_rate=RATE,
            max_requests=options.pick(2 * source.quick_requests, serving.FULL),
        )
        for source in serving.sources_of(options)
        for costs in options.costs
        for policy in _policies(source)
    }


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    plots: dict[str, Plot] = {}
    rows: list[list[Any]] = []
    text, missing = [], []
    for source in serving.sources_of(options):
        for costs in options.costs:
            kept = {policy: results[f"{source.key}|{costs}|{policy}"] for policy in _policies(source)}
            known = {policy: data for policy, data in kept.items() if data["request"] is not None}
            where = f"{source.title}, {costs} costs"
            if "static" not in known:
                missing.append(f"{where}: request figures are undefined for static EP")
                continue
            rows += [[source.title, costs, policy, *row] for policy, data in known.items() for row in _of_request(data)]
            count = min(data["request"]["completed"] for data in known.values())
            plots[f"{source.key}-{costs}"] = Plot(
                _figure(known, where),
                f"What a request waits, {source.title} on {source.cluster or options.cluster}, {costs} costs, "
                f"continuous batching at {RATE:g} requests/s: bars are means with 90 % intervals (bootstrap over "
                f"n = {count} requests or more), marks 99th percentiles, figures at the right the means. "
                "† changes the model's outputs.",
                common_kind([source]),
                common_label([source]),
                wide=True,
            )
            mean = {policy: serving.read(data, "request.mean_e2el_ms") for policy, data in known.items()}
            base = mean.pop("static")
            told = ", ".join(f"{policy} {serving.change_text(value, base)}" for policy, value in mean.items())
            text.append(f"{where}: the mean answer against static EP takes {told}.")
    data = {"requests": Data(COLUMNS, rows, "What requests wait", show=True)}
    return Drawn(plots, data, text=text, warnings=[*missing, *serving.warnings(results)])


def _of_request(data: Mapping[str, Any]) -> list[list[Any]]:
    """What follows the policy in each of its rows."""
    made: list[list[Any]] = []
    for wait in WAITS:
        mean, median, p99 = (data["request"][f"{name}_{wait}_ms"] for name in ("mean", "median", "p99"))
        span = serving.interval(data, f"request.mean_{wait}_ms")
        bounds = [float(value) if np.isfinite(value) else None for value in span]
        made.append([wait, mean, *bounds, median, p99, data["request"]["completed"]])
    return made


def _figure(kept: Mapping[str, Mapping[str, Any]], title: str) -> Any:
    names = [policy + (" †" if data["lossy"] else "") for policy, data in kept.items()]
    size = (style.WIDE, 0.95 + 0.26 * len(names))
    with style.canvas(1, 3, figsize=size, sharey=True) as (figure, grid):
        for axes, (wait, label) in zip(grid, WAITS.items(), strict=True):
            key = f"request.mean_{wait}_ms"
            mean_N = np.array([serving.read(data, key) for data in kept.values()])
            span_N2 = np.array([serving.interval(data, key) for data in kept.values()])
            p99_N = [serving.read(data, f"request.p99_{wait}_ms") for data in kept.values()]
            y = policy_bars(axes, list(kept), mean_N, span_N2, height=0.7)
            axes.plot(p99_N, y, linestyle="none", marker="|", markersize=9, color=style.INK)
            for place, value in zip(y, mean_N, strict=True):
                told = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
                axes.text(1.01, place, told, transform=axes.get_yaxis_transform(), va="center", fontsize=7)
            axes.margins(x=0.05)
            axes.set_xlabel(f"{label} (ms)")
        grid[0].set_yticks(y, names)
        style.heading(figure, f"End-to-end latency, {title}")
    return figure


EXPERIMENTS = (
    Experiment(
        name="endtoend",
        title="Beyond the paper: end-to-end latency",
        question="How long does a user wait for the first token, for each further one, and for the whole answer?",
        stated="Only the time of MoE layers is reported, no request-level latency.",
        jobs=_jobs,
        draw=_draw,
    ),
)
