"""Figure 4: what balance and elasticity are each worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeless.experiments import serving
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import Source, serving_sources
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
    for costs in options.costs:
        found = serving.cells(results, source, costs)
        rows += [serving.row(source, one) for one in found]
        where = f"{source.title} on {options.cluster}, {costs} costs"
        plots[f"{costs}-time"] = Plot(
            result_figures.layer_time_cdf(found, "MoE-layer time"),
            f"Serverful unbalanced (static), serverful balanced (EPLB), serverless (MoEless): {where} "
            f"(n = {found[0].layer.samples:,} layer runs each).",
            source.kind,
            source.label,
        )
        plots[f"{costs}-bills"] = Plot(
            result_figures.bills(found, "Cost of the same work"),
            f"The paper bills an expert while its own layer runs; the other two rules stand beside it: {where}.",
            source.kind,
            source.label,
            wide=True,
        )
    return Drawn(plots, {"results": Data(serving.COLUMNS, rows, "Three kinds of serving", show=True)})


EXPERIMENT = Experiment(
    name="fig4",
    title="Figure 4: serverful unbalanced, serverful balanced, serverless",
    question="Does balancing lower latency, and does elasticity lower cost?",
    stated="Balancing shortens the tail of layer time; serverless experts cut the cost (Phi-3.5-MoE on ShareGPT).",
    jobs=_jobs,
    draw=_draw,
)
