"""Figures 1 and 3: how unevenly experts are loaded, and how load varies over time under real arrivals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import Source, routing_sources
from moeless.experiments.statements import Finding, unanimous
from moeless.report import charts, style

#: The busiest expert at so many times the even share is strong skew: its GPU then works that much longer.
SKEWED = 1.5
#: A standard deviation of so much of the mean is strong variation.
VARIES = 0.25


def _jobs(options: Options, label: str, function: str, params: Mapping[str, Any]) -> Mapping[str, Job]:
    name = f"moeless.experiments.cells.routing:{function}"
    return {
        source.title: Job(f"{label} {source.title}", name, params, (source.job,)) for source in routing_sources(options)
    }


def _skew(options: Options, results: Mapping[str, Any]) -> Drawn:
    plots: dict[str, Plot] = {}
    rows: list[list[Any]] = []
    findings = []
    for source in routing_sources(options):
        found = results[source.title]
        load_LE = np.array(found["load_LE"], np.float64)
        layers = {f"layer {layer}": load_LE[layer] for layer in sorted({0, len(load_LE) // 2, len(load_LE) - 1})}
        size = f"{found['tokens']:,} tokens of {found['requests']:,} requests"
        plots[source.title] = Plot(
            charts.expert_bars(layers, f"Load per expert, {source.title}"),
            f"Share of the load that each expert of {source.title} gets, in three layers; dashed: an even share "
            f"({size}).",
            source.routing,
            source.label,
        )
        plots[f"{source.title}-layers"] = Plot(
            charts.popularity(load_LE, f"All layers, {source.title}"),
            f"Load of every expert in every MoE layer of {source.title} ({size}).",
            source.routing,
            source.label,
        )
        rows += [[source.title, layer, expert, int(load)] for (layer, expert), load in np.ndenumerate(load_LE)]
        skew_L = load_LE.max(1) / load_LE.mean(1)
        findings.append(
            Finding(
                f"skew-{source.key}",
                "Experts of a layer are loaded very unevenly",
                "{about}: the busiest expert of a layer gets {mean:.2f} times the even share, mean over layers (from "
                "{lowest:.2f} to {highest:.2f})",
                {"mean": skew_L.mean(), "lowest": skew_L.min(), "highest": skew_L.max()},
                bool(skew_L.mean() >= SKEWED),
                source.routing,
                about=source.title,
                metric="skew",
            )
        )
    data = {"loads": Data(["model", "layer", "expert", "assignments"], rows, "Assignments per layer and expert")}
    return Drawn(plots, data, findings=findings)


def _over_time(options: Options, results: Mapping[str, Any]) -> Drawn:
    plots, rows, findings = {}, [], []
    for source in routing_sources(options):
        found = results[source.title]
        plots[source.title] = Plot(
            _seconds(source, found),
            f"One-second batches of {found['arrivals']} arrivals replaying {source.title}'s routing: requests, tokens, "
            f"and experts with at least one token, mean over layers "
            f"(n = {sum(row[1] for row in found['rows']):,} requests).",
            source.routing,
            source.label,
        )
        rows += [[source.title, *row] for row in found["rows"]]
        # seconds without requests have no active experts
        spreads = {}
        for column, name in ((1, "requests"), (2, "tokens"), (4, "active experts in decode")):
            value = np.array([row[column] for row in found["rows"] if row[column] is not None], np.float64)
            spreads[name] = float(value.std() / value.mean()) if value.size and value.mean() else 0.0
        findings.append(
            Finding(
                f"variation-{source.key}",
                "Arrivals, tokens and active experts vary strongly over time",
                "{about}, standard deviation over mean from second to second: {each}",
                spreads,
                unanimous(value >= VARIES for value in spreads.values()),
                source.routing,
                about=source.title,
                each="{name} {value:.2f}",
                metric="coefficient of variation",
            )
        )
    columns = ["model", "second", "requests", "tokens", "active experts in prefill", "active experts in decode"]
    return Drawn(plots, {"seconds": Data(columns, rows, "Each second of the workload")}, findings=findings)


def _seconds(source: Source, found: Mapping[str, Any]) -> Any:
    second, requests, tokens, prefill, decode = np.array(found["rows"], np.float64).T
    with style.canvas(3, 1, figsize=(style.COLUMN, 3.7), sharex=True) as (figure, grid):
        grid[0].step(second, requests, where="mid", color=style.SERIES[0], linewidth=1.0)
        grid[0].set_ylabel("requests/s")
        grid[1].step(second, tokens / 1e3, where="mid", color=style.SERIES[1], linewidth=1.0)
        grid[1].set_ylabel("tokens/s (k)")
        grid[2].plot(second, prefill, color=style.SERIES[2], linewidth=1.1, label="prefill")
        grid[2].plot(second, decode, color=style.SERIES[3], linewidth=1.1, linestyle="--", label="decode")
        grid[2].axhline(found["experts"], color=style.INK, linewidth=0.8, linestyle=(0, (4, 2)), label="all experts")
        grid[2].set(ylabel="active experts", xlabel="time (s)", ylim=(0, None))
        figure.legend(loc="outside lower center", ncols=3)
        style.heading(figure, f"Load over time, {source.title}")
    return figure


EXPERIMENTS = (
    Experiment(
        name="fig1",
        title="Figure 1: load per expert",
        question="Are experts of a layer loaded evenly?",
        stated="Strong skew in three layers each of Mixtral-8x7B on ShareGPT and Phi-3.5-MoE on LMSYS-Chat-1M.",
        jobs=lambda options: _jobs(options, "count loads of", "popularity", {}),
        draw=_skew,
    ),
    Experiment(
        name="fig3",
        title="Figure 3: load over time",
        question="How do arrivals, tokens and active experts vary over time?",
        stated="All three vary strongly over time: Phi-3.5-MoE on LMSYS-Chat-1M under Azure arrivals.",
        jobs=lambda options: _jobs(
            options,
            "batch arrivals on",
            "over_time",
            {
                "arrivals": "azure-like",
                "seconds": options.pick(120, 600),
                "request_rate": None,
                "seed": options.seed,
            },
        ),
        draw=_over_time,
    ),
)
