"""What Figures 8 and 9 share: the distribution of MoE-layer time, a panel per model, and the latency claims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments import live, serving
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import DATASETS, Source, common_kind, common_label, serving_sources
from moeless.experiments.statements import CHANGES, Claim, Measured, Stated
from moeless.report import line_figures
from moeless.report.result_figures import names


def experiment(name: str, dataset: str, called: str) -> Experiment:
    """The figure of one data set; the claims, which are about both, stand with Figure 8."""

    def jobs(options: Options) -> Mapping[str, Job]:
        return {**all_jobs(options), **(live.jobs(options) if name == "fig8" else {})}

    def draw(options: Options, results: Mapping[str, Any]) -> Drawn:
        return _draw(options, results, dataset, _claims(options, results) if name == "fig8" else [])

    return Experiment(
        name=name,
        title=f"Figure {name.removeprefix('fig')}: MoE-layer time, {called}",
        question="How long does a MoE layer take under each system?",
        stated="Over both data sets MoEless is 43.19 % below Megatron-LM and 21.89 % below EPLB in mean layer time.",
        jobs=jobs,
        draw=draw,
    )


def all_sources(options: Options) -> list[Source]:
    """The sources of both data sets, each once."""
    every = [source for dataset in DATASETS for source in serving_sources(options, dataset)]
    return list({source.key: source for source in every}.values())


def all_jobs(options: Options) -> dict[str, Job]:
    """Both data sets, since the claims are about both; each run is computed once."""
    return serving.jobs(options, all_sources(options))


def _draw(options: Options, results: Mapping[str, Any], dataset: str, claims: list[Claim]) -> Drawn:
    sources = serving_sources(options, dataset)
    plots: dict[str, Plot] = {}
    rows: list[list[Any]] = []
    curves: list[list[Any]] = []
    warned: dict[str, list[str]] = {}
    for costs in options.costs:
        grid: dict[str, dict[str, line_figures.Line]] = {}
        samples = []
        for source in sources:
            kept = serving.rows_of(results, source, costs)
            found = [serving.cell(data) for data in kept]
            samples += [one.layer.samples for one in found]
            rows += [serving.row(source, one) for one in found]
            for text in (text for one in found for text in one.warnings):
                warned.setdefault(text, []).append(source.title)
            shown = {name: serving.distribution(data) for name, data in zip(names(found), kept, strict=True)}
            grid[source.title] = {
                name: line_figures.Line(middle, np.arange(101), left=left, right=right)
                for name, (middle, left, right) in shown.items()
            }
            curves += [
                [source.title, costs, name, percent, *times]
                for name, curve in shown.items()
                for percent, times in enumerate(zip(*(each.tolist() for each in curve), strict=True))
            ]
        plots[costs] = Plot(
            line_figures.panels(
                grid,
                xlabel="time of one MoE layer (ms)",
                ylabel="layers at most that slow (%)",
                title=f"MoE-layer time under {costs} costs",
                policies=True,
                log_x=True,
            ),
            f"Distribution of MoE-layer time on {options.cluster}, {costs} costs, one-second batches of Azure-like "
            f"arrivals (n from {min(samples):,} to {max(samples):,} layer runs a line). Bands: {serving.BAND}. "
            "† changes the model's outputs.",
            common_kind(sources),
            common_label(sources),
            wide=len(sources) > 1,
        )
    data = {
        "results": Data(serving.COLUMNS, rows, "Each policy under each cost model", show=True),
        "cdf": Data(["source", "costs", "policy", "per cent", "layer time (ms)", "low", "high"], curves),
    }
    warnings = [f"{text} ({', '.join(dict.fromkeys(titles))})" for text, titles in warned.items()]
    return Drawn(plots, data, claims, warnings=warnings)


def _claims(options: Options, results: Mapping[str, Any]) -> list[Claim]:
    """Mean reduction of mean layer time over models and data sets."""
    note = (
        "mean and range over models and data sets of each one's mean layer time; the paper's costs are linear in "
        "tokens, physical ones have a floor (an expert's weights are read once per use); live: control in Python on "
        "the processor cores that compute"
    )
    return [
        claim(
            options,
            results,
            f"layer-time-{against}",
            "Mean MoE-layer time of MoEless against {}",
            against,
            ("layer.mean_ms", "layer.mean_ms"),
            "moeless reproduce fig8",
            note,
        )
        for against in ("static", "eplb")
    ]


def claim(
    options: Options,
    results: Mapping[str, Any],
    identity: str,
    statement: str,
    against: str,
    metrics: tuple[str, str],
    command: str,
    note: str,
) -> Claim:
    """MoEless's change in per cent against another system, of every source, under both cost models and live.

    Args:
        statement: a template of the other system's name.
        against: its planner.
        metrics: what is read of MoEless and of the other system.
    """
    sources, name = all_sources(options), serving.PAPER_NAMES[against]
    ours = {
        side: Measured(
            {
                source.key: serving.changed(serving.cells(results, source, costs), against, *metrics)
                for source in sources
            },
            "%",
            metrics[0],
            costs,
        )
        for side, costs in (("paper_rules", "paper"), ("physical", "roofline"))
        if costs in options.costs
    }
    stated = CHANGES.get((metrics[0], against))
    return Claim(
        identity,
        statement.format(name),
        name,
        None if stated is None else Stated((stated,), "%"),
        ours | live.change(live.cells(options, results), against, *metrics),
        "lower",
        common_kind(sources),
        command,
        note,
    )
