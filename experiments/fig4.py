"""Figure 4: what balance and elasticity are each worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeless.experiments import serving
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import Source, serving_sources
from moeless.experiments.statements import Finding
from moeless.metrics.result import Cell
from moeless.report import result_figures


def _source(options: Options) -> Source:
    """The paper shows Phi-3.5-MoE on ShareGPT."""
    sources = serving_sources(options, "sharegpt")
    return next((source for source in sources if source.title.startswith("phi")), sources[0])


def _jobs(options: Options) -> Mapping[str, Job]:
    source = _source(options)
    return serving.jobs(options, [source], ("static", "eplb:history", serving.moeless_policy(source)))


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    source = _source(options)
    plots: dict[str, Plot] = {}
    rows = []
    findings = []
    for costs in options.costs:
        kept = serving.rows_of(results, source, costs)
        found = [serving.cell(data) for data in kept]
        rows += [serving.row(source, one) for one in found]
        where = f"{source.title} on {options.cluster}, {costs} costs"
        plots[f"{costs}-time"] = Plot(
            result_figures.layer_time_cdf(found, "MoE-layer time", [serving.distribution(data)[1:] for data in kept]),
            f"Serverful unbalanced (static), serverful balanced (EPLB), serverless (MoEless): {where} "
            f"(n = {found[0].layer.samples:,} layer runs each). Bands: {serving.BAND}.",
            source.kind,
            source.label,
        )
        plots[f"{costs}-bills"] = Plot(
            result_figures.bills(
                found,
                "Cost of the same work",
                {"paper": [serving.interval(data, "billing.paper") for data in kept]},
            ),
            f"The paper bills an expert while its own layer runs; the other two rules stand beside it: {where} "
            f"(n = {found[0].layer.samples:,} layer runs each). {serving.WHISKERS}",
            source.kind,
            source.label,
            wide=True,
        )
        findings += _findings(found, costs)
    data = {"results": Data(serving.COLUMNS, rows, "Three kinds of serving", show=True)}
    return Drawn(plots, data, findings=findings)


def _findings(found: list[Cell], costs: str) -> list[Finding]:
    static, balanced, serverless = (serving.of(found, name) for name in ("static", "eplb", "moeless"))
    tail = -serving.reduction(balanced.layer.p99_ms, static.layer.p99_ms)
    bill = -serving.reduction(serverless.billing.paper, static.billing.paper)
    whole = -serving.reduction(serverless.billing.paper, static.billing.paper_whole or 0.0)
    return [
        Finding(
            f"balance-tail-{costs}",
            "Balancing shortens the tail of layer time",
            "{costs} costs: p99 of EPLB {change:change} against static",
            {"change": tail},
            tail <= -1.0,
            static.evidence,
            metric="layer.p99_ms",
            costs=costs,
        ),
        Finding(
            f"serverless-cost-{costs}",
            "Serverless experts cut the cost",
            "{costs} costs, the paper's rule: {own:change} with one rule for both, {whole:change} where static "
            "pays for all layers all the time",
            {"own": bill, "whole": whole},
            bill <= -1.0 if bill * whole > 0 else None,
            static.evidence,
            metric="billing.paper",
            costs=costs,
        ),
    ]


EXPERIMENT = Experiment(
    name="fig4",
    title="Figure 4: serverful unbalanced, serverful balanced, serverless",
    question="Does balancing lower latency, and does elasticity lower cost?",
    stated="Balancing shortens the tail of layer time; serverless experts cut the cost (Phi-3.5-MoE on ShareGPT).",
    jobs=_jobs,
    draw=_draw,
)
