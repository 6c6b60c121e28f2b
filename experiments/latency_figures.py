"""What Figures 8 and 9 share: the distribution of MoE-layer time, a panel per model, and the latency claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moeless.experiments import serving
from moeless.experiments.base import Claim, Data, Drawn, Job, Kind, Options, Plot
from moeless.experiments.sources import DATASETS, Source, common_kind, common_label, serving_sources
from moeless.metrics.result import Cell
from moeless.report import line_figures
from moeless.report.result_figures import names


def jobs(options: Options) -> Mapping[str, Job]:
    """All data sets, since the claims are about both; each run is computed once."""
    made: dict[str, Job] = {}
    for dataset in DATASETS:
        made |= serving.jobs(options, serving_sources(options, dataset))
    return made


def draw(options: Options, results: Mapping[str, Any], dataset: str, figure: str) -> Drawn:
    """Panels of one data set, one figure per cost model; claims only in ``fig8``."""
    sources = serving_sources(options, dataset)
    plots: dict[str, Plot] = {}
    rows: list[list[Any]] = []
    curves: list[list[Any]] = []
    warnings: list[str] = []
    for costs in options.costs:
        grid: dict[str, dict[str, line_figures.Line]] = {}
        samples = []
        for source in sources:
            found = serving.cells(results, source, costs)
            samples += [one.layer.samples for one in found]
            rows += [serving.row(source, one) for one in found]
            warnings += [f"{source.title}: {text}" for one in found for text in one.warnings]
            shown = dict(zip(names(found), found, strict=True))
            grid[source.title] = {
                name: line_figures.Line(np.array(one.layer.cdf_ms), np.arange(101)) for name, one in shown.items()
            }
            curves += [
                [source.title, costs, name, percent, time]
                for name, one in shown.items()
                for percent, time in enumerate(one.layer.cdf_ms)
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
            f"arrivals (n from {min(samples):,} to {max(samples):,} layer runs a line). † changes the model's outputs.",
            common_kind(sources),
            common_label(sources),
            wide=len(sources) > 1,
        )
    data = {
        "results": Data(serving.COLUMNS, rows, "Each policy under each cost model", show=True),
        "cdf": Data(["source", "costs", "policy", "per cent", "layer time (ms)"], curves),
    }
    claims = latency_claims(options, results) if figure == "fig8" else []
    return Drawn(plots, data, claims, warnings=list(dict.fromkeys(warnings)))


def latency_claims(options: Options, results: Mapping[str, Any]) -> list[Claim]:
    """Mean reduction of mean layer time over models and data sets."""
    sources = [source for dataset in DATASETS for source in serving_sources(options, dataset)]
    sources = list({source.key: source for source in sources}.values())
    claims = []
    for stated, against in (("−43.19 %", "static"), ("−21.89 %", "eplb")):
        note = (
            "mean over models and data sets of each one's mean layer time; the paper's costs are linear in tokens, "
            "physical ones have a floor (an expert's weights are read once per use)"
        )
        claims.append(
            Claim(
                f"Mean MoE-layer time of MoEless against {serving.PAPER_NAMES[against]}",
                stated,
                _mean_change(results, sources, "paper", against, options),
                _mean_change(results, sources, "roofline", against, options),
                None,
                claim_kind(sources),
                "moeless reproduce fig8",
                note,
            )
        )
    return claims


def claim_kind(sources: Sequence[Source]) -> Kind:
    """The weakest evidence among the sources."""
    return common_kind(sources)


def _mean_change(
    results: Mapping[str, Any], sources: Sequence[Source], costs: str, against: str, options: Options
) -> str | None:
    if costs not in options.costs:
        return None
    changes = []
    for source in sources:
        found = serving.cells(results, source, costs)
        mine: Cell = serving.of(found, "moeless")
        changes.append(-serving.reduction(mine.layer.mean_ms, serving.of(found, against).layer.mean_ms))
    return signed(float(np.mean(changes)))


def signed(percent: float) -> str:
    """A change in per cent with its sign."""
    return f"{percent:+.1f} %".replace("-", "−")
