"""Figures 4 and 8 to 10: layer time and cost of the paper's systems, and the claims about both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments import live, serving
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import DATASETS, Source, common_kind, common_label, serving_sources
from moeless.experiments.statements import CHANGES, SMALL, Claim, Finding, Measured, Stated
from moeless.metrics.result import Cell
from moeless.report import charts, result_page, style
from moeless.report.charts import whiskers
from moeless.report.result_page import BILLS, names


def _shown(options: Options) -> Source:
    """Figure 4's source: the paper shows Phi-3.5-MoE on ShareGPT."""
    sources = serving_sources(options, "sharegpt")
    return next((source for source in sources if source.title.startswith("phi")), sources[0])


def _kinds_jobs(options: Options) -> Mapping[str, Job]:
    source = _shown(options)
    return serving.jobs(options, [source], ("static", "eplb:history", serving.moeless_policy(source)))


def _kinds(options: Options, results: Mapping[str, Any]) -> Drawn:
    source = _shown(options)
    plots: dict[str, Plot] = {}
    cells: list[Cell] = []
    findings = []
    for costs in options.costs:
        kept = serving.rows_of(results, source, costs)
        found = [serving.cell(data) for data in kept]
        cells += found
        where = f"{source.title} on {options.cluster}, {costs} costs"
        runs = f"(n = {found[0].layer.samples:,} layer runs each)"
        plots[f"{costs}-time"] = Plot(
            result_page.layer_time_cdf(found, "MoE-layer time", [serving.distribution(data)[1:] for data in kept]),
            f"Serverful unbalanced (static), serverful balanced (EPLB), serverless (MoEless): {where} {runs}. "
            f"Bands: {serving.BAND}.",
            source.kind,
            source.label,
        )
        spans = {"paper": [serving.interval(data, "billing.paper") for data in kept]}
        plots[f"{costs}-bills"] = Plot(
            result_page.bills(found, "Cost of the same work", spans),
            f"The paper bills an expert while its own layer runs; the other two rules stand beside it: {where} {runs}. "
            f"{serving.WHISKERS}",
            source.kind,
            source.label,
            wide=True,
        )
        findings += _kinds_findings(found, costs)
    data = {"results": serving.systems(((source, one) for one in cells), "Three kinds of serving")}
    return Drawn(plots, data, findings=findings)


def _kinds_findings(found: list[Cell], costs: str) -> list[Finding]:
    static, balanced, serverless = (serving.of(found, name) for name in ("static", "eplb", "moeless"))
    tail = serving.change(balanced.layer.p99_ms, static.layer.p99_ms)
    own = serving.change(serverless.billing.paper, static.billing.paper)
    whole = serving.change(serverless.billing.paper, static.billing.paper_whole)
    return [
        Finding(
            f"balance-tail-{costs}",
            "Balancing shortens the tail of layer time",
            "{costs} costs: p99 of EPLB {change:change} against static",
            {"change": tail},
            tail <= -SMALL,
            static.evidence,
            metric="layer.p99_ms",
            costs=costs,
        ),
        Finding(
            f"serverless-cost-{costs}",
            "Serverless experts cut the cost",
            "{costs} costs, the paper's rule: {own:change} with one rule for both, {whole:change} where static pays "
            "for all layers all the time",
            {"own": own, "whole": whole},
            own <= -SMALL if own * whole > 0 else None,
            static.evidence,
            metric="billing.paper",
            costs=costs,
        ),
    ]


def all_sources(options: Options) -> list[Source]:
    """The sources of both data sets, each once."""
    every = [source for dataset in DATASETS for source in serving_sources(options, dataset)]
    return list({source.key: source for source in every}.values())


def all_jobs(options: Options) -> dict[str, Job]:
    """Both data sets, since the claims are about both; each run is computed once."""
    return serving.jobs(options, all_sources(options))


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
    ours = {}
    for side, costs in (("paper_rules", "paper"), ("physical", "roofline")):
        if costs in options.costs:
            found = {source.key: serving.cells(results, source, costs) for source in sources}
            changes = {key: serving.changed(rows, against, *metrics) for key, rows in found.items()}
            ours[side] = Measured(changes, "%", metrics[0], costs)
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


def _latency(name: str, dataset: str, called: str, with_claims: bool) -> Experiment:
    """The figure of one data set; the claims, which are about both, stand with one of them."""

    def draw(options: Options, results: Mapping[str, Any]) -> Drawn:
        return _distributions(options, results, dataset, _latency_claims(options, results) if with_claims else [])

    return Experiment(
        name=name,
        title=f"Figure {name.removeprefix('fig')}: MoE-layer time, {called}",
        question="How long does a MoE layer take under each system?",
        stated="Over both data sets MoEless is 43.19 % below Megatron-LM and 21.89 % below EPLB in mean layer time.",
        jobs=lambda options: {**all_jobs(options), **(live.jobs(options) if with_claims else {})},
        draw=draw,
    )


def _distributions(options: Options, results: Mapping[str, Any], dataset: str, claims: list[Claim]) -> Drawn:
    sources = serving_sources(options, dataset)
    plots: dict[str, Plot] = {}
    cells: list[tuple[Source, Cell]] = []
    curves: list[list[Any]] = []
    warned: dict[str, list[str]] = {}
    for costs in options.costs:
        grid: dict[str, dict[str, charts.Line]] = {}
        samples = []
        for source in sources:
            kept = serving.rows_of(results, source, costs)
            found = [serving.cell(data) for data in kept]
            samples += [one.layer.samples for one in found]
            cells += [(source, one) for one in found]
            for text in (text for one in found for text in one.warnings):
                warned.setdefault(text, []).append(source.title)
            shown = {name: serving.distribution(data) for name, data in zip(names(found), kept, strict=True)}
            grid[source.title] = {
                name: charts.Line(middle, np.arange(101), left=left, right=right)
                for name, (middle, left, right) in shown.items()
            }
            curves += [
                [source.title, costs, name, percent, *times]
                for name, curve in shown.items()
                for percent, times in enumerate(zip(*(each.tolist() for each in curve), strict=True))
            ]
        plots[costs] = Plot(
            charts.panels(
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
        "results": serving.systems(cells, "Each policy under each cost model"),
        "cdf": Data(["source", "costs", "policy", "per cent", "layer time (ms)", "low", "high"], curves),
    }
    warnings = [f"{text} ({', '.join(dict.fromkeys(titles))})" for text, titles in warned.items()]
    return Drawn(plots, data, claims, warnings=warnings)


def _latency_claims(options: Options, results: Mapping[str, Any]) -> list[Claim]:
    note = (
        "mean and range over models and data sets of each one's mean layer time; the paper's costs are linear in "
        "tokens, physical ones have a floor (an expert's weights are read once per use); live: control in Python on "
        "the processor cores that compute"
    )
    statement, metrics = "Mean MoE-layer time of MoEless against {}", ("layer.mean_ms", "layer.mean_ms")
    return [
        claim(options, results, f"layer-time-{against}", statement, against, metrics, "moeless reproduce fig8", note)
        for against in ("static", "eplb")
    ]


#: (metric of MoEless, metric of the other system, how the claim is called, what it means).
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


def _cost(options: Options, results: Mapping[str, Any]) -> Drawn:
    sources = all_sources(options)
    plots: dict[str, Plot] = {}
    cells: list[tuple[Source, Cell]] = []
    for costs in options.costs:
        cells += [(source, one) for source in sources for one in serving.cells(results, source, costs)]
        plots[costs] = Plot(
            _cost_figure(options, results, sources, costs),
            f"Cost relative to Megatron-LM (static EP) by three billing rules, {costs} costs, {options.cluster}; the "
            "paper bills an expert only while its own layer runs "
            f"(n = {serving.fewest_runs(one for _, one in cells):,} layer runs or more a bar). Whiskers on the "
            f"paper's rule: {serving.PAIRED}; the other rules bill one run's clock. † changes the model's outputs.",
            common_kind(sources),
            common_label(sources),
            wide=True,
        )
    claims = [
        claim(
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
    return Drawn(plots, {"bills": serving.systems(cells, "Each policy's bills", show=False)}, claims)


def _cost_figure(options: Options, results: Mapping[str, Any], sources: list[Source], costs: str) -> Any:
    planners = [one.policy.partition(":")[0] for one in serving.cells(results, sources[0], costs)]
    look = style.looks(planners)
    rules = [options.billing, *(rule for rule in BILLS if rule != options.billing)]
    width = 0.8 / len(planners)
    with style.canvas(1, 3, figsize=(style.WIDE, 3.1), sharey=True) as (figure, grid):
        for axes, rule in zip(grid, rules, strict=True):
            for place, source in enumerate(sources):
                kept = serving.rows_of(results, source, costs)
                base = next(data for data in kept if data["policy"].startswith("static"))
                for order, (planner, data) in enumerate(zip(planners, kept, strict=True)):
                    at = place + (order - (len(planners) - 1) / 2) * width
                    under = data["billing"][rule] / base["billing"][rule] if base["billing"][rule] else np.nan
                    name = serving.PAPER_NAMES.get(planner, planner) + (" †" if data["lossy"] else "")
                    label = name if place == 0 and rule == rules[0] else None
                    axes.bar(at, under, width * 0.92, color=look[planner].colour, label=label)
                    _, low, high = serving.ratio(data, base, "billing.paper")
                    if rule == "paper" and np.isfinite(low):
                        whiskers(axes, [under], [at], [low], [high], horizontal=False)
            axes.axhline(1.0, color=style.INK, linewidth=0.7)
            axes.set_title(BILLS[rule].partition(" (")[0], fontweight="normal")
            labels = [source.title.partition(" (")[0] + _dataset(source) for source in sources]
            axes.set_xticks(range(len(sources)), labels, fontsize=6.5, rotation=60, ha="right", rotation_mode="anchor")
        grid[0].set_ylabel("cost ÷ Megatron-LM's")
        style.heading(figure, f"Cost under {costs} costs")
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def _dataset(source: Source) -> str:
    """The data set that a synthetic source stands for."""
    name = source.key.rpartition("-")[2]
    return f", {name}" if name in DATASETS else ""


EXPERIMENTS = (
    Experiment(
        name="fig4",
        title="Figure 4: serverful unbalanced, serverful balanced, serverless",
        question="Does balancing lower latency, and does elasticity lower cost?",
        stated="Balancing shortens the tail of layer time; serverless experts cut the cost (Phi-3.5-MoE on ShareGPT).",
        jobs=_kinds_jobs,
        draw=_kinds,
    ),
    _latency("fig8", "lmsys", "LMSYS-Chat-1M", with_claims=True),
    _latency("fig9", "sharegpt", "ShareGPT", with_claims=False),
    Experiment(
        name="fig10",
        title="Figure 10: cost",
        question="What does serving cost, by whose bill?",
        stated="MoEless costs 92.68 % less than Megatron-LM, 84.06 % less than Oracle, 95.11 % less than EPLB "
        "(memory times latency).",
        jobs=lambda options: {**all_jobs(options), **live.jobs(options)},
        draw=_cost,
    ),
)
