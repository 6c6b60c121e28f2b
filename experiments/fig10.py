"""Figure 10: cost of serving."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments import latency_figures, live, serving
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import DATASETS, Source, common_kind, common_label
from moeless.experiments.statements import Claim
from moeless.report import style
from moeless.report.bar_figures import whiskers
from moeless.report.result_figures import BILLS


def _jobs(options: Options) -> Mapping[str, Job]:
    return {**latency_figures.all_jobs(options), **live.jobs(options)}


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    sources = latency_figures.all_sources(options)
    plots: dict[str, Plot] = {}
    rows = []
    for costs in options.costs:
        for source in sources:
            rows += [serving.row(source, one) for one in serving.cells(results, source, costs)]
        plots[costs] = Plot(
            _figure(options, results, sources, costs),
            f"Cost relative to Megatron-LM (static EP) by three billing rules, {costs} costs, {options.cluster}; the "
            "paper bills an expert only while its own layer runs "
            f"(n = {min(row[12] for row in rows):,} layer runs or more a bar). Whiskers on the paper's rule: "
            f"{serving.PAIRED}; the other rules bill one run's clock. † changes the model's outputs.",
            common_kind(sources),
            common_label(sources),
            wide=True,
        )
    data = {"bills": Data(serving.COLUMNS, rows, "Each policy's bills", show=False)}
    return Drawn(plots, data, _claims(options, results))


def _dataset(source: Source) -> str:
    """The data set that a synthetic source stands for."""
    name = source.key.rpartition("-")[2]
    return f", {name}" if name in DATASETS else ""


def _figure(options: Options, results: Mapping[str, Any], sources: list[Source], costs: str) -> Any:
    first = serving.cells(results, sources[0], costs)
    look = style.looks([one.policy for one in first])
    rules = [options.billing, *(rule for rule in BILLS if rule != options.billing)]
    with style.drawing() as plt:
        figure, grid = plt.subplots(1, 3, figsize=(style.WIDE, 3.1), layout="constrained", sharey=True)
        width = 0.8 / len(first)
        for axes, rule in zip(grid, rules, strict=True):
            for place, source in enumerate(sources):
                kept = serving.rows_of(results, source, costs)
                found = [serving.cell(data) for data in kept]
                static = next(data for data in kept if data["policy"].startswith("static"))
                base = getattr(serving.of(found, "static").billing, rule)
                for order, one in enumerate(found):
                    value = getattr(one.billing, rule) / base if base else np.nan
                    planner = one.policy.partition(":")[0]
                    name = serving.PAPER_NAMES.get(planner, planner) + (" †" if one.lossy else "")
                    drawn = next(one for name, one in look.items() if name.partition(":")[0] == planner)
                    axes.bar(
                        place + (order - (len(found) - 1) / 2) * width,
                        value,
                        width * 0.92,
                        color=drawn.colour,
                        label=name if place == 0 and rule == rules[0] else None,
                    )
                    _, low, high = serving.ratio(kept[order], static, "bill")
                    if rule == "paper" and np.isfinite(low):
                        at = place + (order - (len(found) - 1) / 2) * width
                        whiskers(axes, [value], [at], [low], [high], horizontal=False)
            axes.axhline(1.0, color=style.INK, linewidth=0.7)
            axes.set_title(BILLS[rule].partition(" (")[0], fontweight="normal")
            labels = [source.title.partition(" (")[0] + _dataset(source) for source in sources]
            axes.set_xticks(range(len(sources)), labels, fontsize=6.5, rotation=60, ha="right", rotation_mode="anchor")
        grid[0].set_ylabel("cost ÷ Megatron-LM's")
        figure.suptitle(f"Cost under {costs} costs", x=0.01, ha="left", fontsize=8.5, fontweight="bold")
        figure.legend(loc="outside lower center", ncols=4)
        plt.close(figure)
    return figure


#: (metric of MoEless, metric of the other system, how the row is called, what it means).
_RULES = (
    (
        "billing.paper",
        "billing.paper",
        "one rule for all",
        "every system billed for an expert only while its own layer runs",
    ),
    (
        "billing.paper",
        "billing.paper_whole",
        "baseline billed for all layers",
        "MoEless by its own rule, the other for all layers' experts all the time: the reading under which savings of "
        "the stated size appear, most favourable to serverless",
    ),
    (
        "billing.resident",
        "billing.resident",
        "resident memory",
        "expert copies in memory, keep-alive included",
    ),
    (
        "billing.gpu_seconds",
        "billing.gpu_seconds",
        "whole GPUs",
        "GPUs held; freeing memory on a GPU that stays saves nothing",
    ),
)


def _claims(options: Options, results: Mapping[str, Any]) -> list[Claim]:
    return [
        latency_figures.claim(
            options,
            results,
            f"cost-{against}-{theirs.partition('.')[2]}",
            f"Cost of MoEless against {{}}, {short}",
            against,
            (mine, theirs),
            "moeless reproduce fig10",
            note,
        )
        for against in ("static", "oracle", "eplb")
        for mine, theirs, short, note in _RULES
    ]


EXPERIMENT = Experiment(
    name="fig10",
    title="Figure 10: cost",
    question="What does serving cost, by whose bill?",
    stated="MoEless costs 92.68 % less than Megatron-LM, 84.06 % less than Oracle, 95.11 % less than EPLB "
    "(memory times latency).",
    jobs=_jobs,
    draw=_draw,
)
