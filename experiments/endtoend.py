"""End-to-end latency: what a user waits, under each policy, which the paper does not report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments import serving, study
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import Source, at_hand, common_kind, common_label, synthetic
from moeless.report import style
from moeless.report.bar_figures import whiskers

#: Field of the result to its name on the axis.
METRICS = {"ttft": "time to first token (ms)", "tpot": "time per output token (ms)", "e2el": "whole answer (ms)"}
#: Loose enough for eight A6000; the rate is what they serve without a growing queue.
RATE = 4.0
COLUMNS = ("source", "costs", "policy", "metric", "mean (ms)", "low", "high", "median (ms)", "p99 (ms)", "requests")


def _sources(options: Options) -> list[Source]:
    return at_hand(options, [synthetic(options, (options.models or ("phi-3.5-moe",))[0], "lmsys")])


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
            **{
                **study.CONTINUOUS,
                "request_rate": RATE,
                "max_requests": options.pick(2 * source.quick_requests, serving.FULL),
            },
        )
        for source in _sources(options)
        for costs in options.costs
        for policy in _policies(source)
    }


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    plots: dict[str, Plot] = {}
    rows: list[list[Any]] = []
    text, missing = [], []
    for source in _sources(options):
        for costs in options.costs:
            kept = {policy: results[f"{source.key}|{costs}|{policy}"] for policy in _policies(source)}
            known = {policy: data for policy, data in kept.items() if data["request"] is not None}
            if "static" not in known:
                missing.append(f"{source.title}, {costs} costs: request figures are undefined for static EP")
                continue
            rows += [row for policy, data in known.items() for row in _rows(source, costs, policy, data)]
            count = min(data["request"]["completed"] for data in known.values())
            plots[f"{source.key}-{costs}"] = Plot(
                _figure(known, f"{source.title}, {costs} costs"),
                f"What a request waits, {source.title} on {source.cluster or options.cluster}, {costs} costs, "
                f"continuous batching at {RATE:g} requests/s: bars are means with 90 % intervals (bootstrap over "
                f"n = {count} requests or more), marks 99th percentiles, figures at the right the means. "
                "† changes the model's outputs.",
                common_kind([source]),
                common_label([source]),
                wide=True,
            )
            base = serving.read(known["static"], "request.mean_e2el_ms")
            told = ", ".join(
                f"{policy} {study.change(serving.read(data, 'request.mean_e2el_ms'), base)}"
                for policy, data in known.items()
                if policy != "static"
            )
            text.append(f"{source.title}, {costs} costs: the mean answer against static EP takes {told}.")
    data = {"requests": Data(COLUMNS, rows, "What requests wait", show=True)}
    return Drawn(plots, data, text=text, warnings=[*missing, *study.warnings(results)])


def _rows(source: Source, costs: str, policy: str, data: Mapping[str, Any]) -> list[list[Any]]:
    made: list[list[Any]] = []
    for metric in METRICS:
        low, high = serving.interval(data, f"request.mean_{metric}_ms")
        figures = [data["request"][f"{name}_{metric}_ms"] for name in ("mean", "median", "p99")]
        bounds = [float(value) if np.isfinite(value) else None for value in (low, high)]
        made.append([source.title, costs, policy, metric, figures[0], *bounds, *figures[1:]])
        made[-1].append(data["request"]["completed"])
    return made


def _figure(kept: Mapping[str, Mapping[str, Any]], title: str) -> Any:
    names = [policy + (" †" if data["lossy"] else "") for policy, data in kept.items()]
    look = style.looks(list(kept))
    with style.drawing() as plt:
        figure, grid = plt.subplots(
            1, 3, figsize=(style.WIDE, 0.95 + 0.26 * len(names)), layout="constrained", sharey=True
        )
        y = np.arange(len(names))[::-1]
        for axes, (metric, label) in zip(grid, METRICS.items(), strict=True):
            mean_N = np.array([serving.read(data, f"request.mean_{metric}_ms") for data in kept.values()])
            p99_N = np.array([serving.read(data, f"request.p99_{metric}_ms") for data in kept.values()])
            span_N2 = np.array([serving.interval(data, f"request.mean_{metric}_ms") for data in kept.values()])
            for place, value, policy in zip(y, mean_N, kept, strict=True):
                one = look[policy]
                axes.barh(place, value, 0.7, color=one.colour, hatch=one.hatch, edgecolor="white", linewidth=0)
            whiskers(axes, mean_N, y, span_N2[:, 0], span_N2[:, 1], horizontal=True)
            axes.plot(p99_N, y, linestyle="none", marker="|", markersize=9, color=style.INK)
            for place, value in zip(y, mean_N, strict=True):
                axes.text(
                    1.01,
                    place,
                    f"{value:,.0f}" if value >= 1000 else f"{value:.3g}",
                    transform=axes.get_yaxis_transform(),
                    va="center",
                    fontsize=7,
                )
            axes.grid(True, axis="x")
            axes.grid(False, axis="y")
            axes.margins(x=0.05)
            axes.set_xlabel(label)
            axes.locator_params(axis="x", nbins=4)
        grid[0].set_yticks(y, names)
        figure.suptitle(f"End-to-end latency, {title}", x=0.01, ha="left", fontsize=8.5, fontweight="bold")
        plt.close(figure)
    return figure


EXPERIMENT = Experiment(
    name="endtoend",
    title="Beyond the paper: end-to-end latency",
    question="How long does a user wait for the first token, for each further one, and for the whole answer?",
    stated="Only the time of MoE layers is reported, no request-level latency.",
    jobs=_jobs,
    draw=_draw,
)
