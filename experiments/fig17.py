"""Figure 17: what each component is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments import serving
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import Source, common_kind, common_label, sweep_sources
from moeless.experiments.statements import SMALL, Finding, unanimous
from moeless.report import style
from moeless.report.bar_figures import Bars, bars

#: Variant to (policy, changes of the workload); None is the full system's policy. The paper shows the first and last.
VARIANTS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "full system": (None, {}),
    "history, no prediction": ("moeless:history", {}),
    "perfect forecast": ("moeless:oracle", {}),
    "no extra copies": (None, {"extra_slots": 0}),
    "no keep-alive": (None, {"keep_alive": 0.0}),
    "none of them": ("static", {}),
}


def _jobs(options: Options) -> Mapping[str, Job]:
    made = {}
    for source in sweep_sources(options):
        for costs in options.costs:
            for variant, (policy, changes) in VARIANTS.items():
                chosen = policy or serving.moeless_policy(source)
                made[f"{source.key}|{costs}|{variant}"] = serving.job(options, source, chosen, costs, **changes)
    return made


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    sources = sweep_sources(options)
    plots: dict[str, Plot] = {}
    rows: list[list[Any]] = []
    findings = []
    for costs in options.costs:
        for source in sources:
            for variant in VARIANTS:
                one = serving.cell(results[f"{source.key}|{costs}|{variant}"])
                layer, bill = one.layer, one.billing
                figures = (layer.mean_ms, layer.replicas, bill.paper, bill.resident, layer.samples)
                rows.append([source.title, costs, variant, *figures])
        findings.append(_finding(results, sources, costs))
        plots[costs] = Plot(
            _figure(results, sources, costs),
            f"Mean MoE-layer time with one component taken away or replaced, relative to the full system; "
            f"{options.cluster}, {costs} costs (n = {min(row[-1] for row in rows):,} layer runs or more a bar). "
            f"Whiskers: {serving.PAIRED}.",
            common_kind(sources),
            common_label(sources),
        )
    columns = ["source", "costs", "variant", "mean layer (ms)", "replicas per layer", "paper bill (GB·s)"]
    columns += ["resident bill (GB·s)", "layer runs"]
    return Drawn(plots, {"variants": Data(columns, rows, "Each variant", show=True)}, findings=findings)


def _finding(results: Mapping[str, Any], sources: list[Source], costs: str) -> Finding:
    slower = {}
    for source in sources:
        full, none = (
            serving.cell(results[f"{source.key}|{costs}|{name}"]).layer.mean_ms
            for name in ("full system", "none of them")
        )
        slower[source.title] = -serving.reduction(none, full)
    return Finding(
        f"ablation-slower-{costs}",
        "Without prediction, scaling and placement a layer is slower",
        "{costs} costs, layer time without prediction, scaling and placement: {each}",
        slower,
        unanimous(change >= SMALL for change in slower.values()),
        common_kind(sources),
        each="{name} {value:change}",
        metric="layer.mean_ms",
        costs=costs,
    )


def _figure(results: Mapping[str, Any], sources: list[Source], costs: str) -> Any:
    look = style.series([source.title for source in sources])
    series = {}
    for source in sources:
        rows = [results[f"{source.key}|{costs}|{name}"] for name in VARIANTS]
        ratio_N3 = np.array([serving.ratio(row, rows[0]) for row in rows])
        series[source.title] = Bars(ratio_N3[:, 0], look[source.title].colour, ratio_N3[:, 1], ratio_N3[:, 2])
    return bars(list(VARIANTS), series, xlabel="mean layer time ÷ full system's", title=f"Ablation, {costs} costs")


EXPERIMENT = Experiment(
    name="fig17",
    title="Figure 17: ablation",
    question="What is each component worth?",
    stated="One variant without prediction, scaling and placement is slower.",
    jobs=_jobs,
    draw=_draw,
)
