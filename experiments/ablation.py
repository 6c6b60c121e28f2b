"""Figure 17 and each component alone: what forecast, copies, placement, warm reuse and dispatch are worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments import serving
from moeless.experiments.base import Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import common_kind, common_label, sweep_sources
from moeless.experiments.statements import SMALL, Finding, unanimous
from moeless.metrics.result import Cell
from moeless.report import style
from moeless.report.charts import Bars, bars

#: Variant to (policy, changes of the workload); None is the full system's policy. The paper shows the first and last.
VARIANTS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "full system": (None, {}),
    "history, no prediction": ("moeless:history", {}),
    "perfect forecast": ("moeless:oracle", {}),
    "no extra copies": (None, {"extra_slots": 0}),
    "no keep-alive": (None, {"keep_alive": 0.0}),
    "none of them": ("static", {}),
}
_OFF = {"place": False, "reuse": False}
#: Variant to (policy, planner parameters, changes of the workload). The forecast is perfect where there is one: it is
#: the most that any predictor can be worth.
COMPONENTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "static EP": ("static", {}, {}),
    "copies alone": ("parts:history", _OFF, {}),
    "placement alone": ("parts:history", {"reuse": False}, {"extra_slots": 0}),
    "copies + placement": ("parts:history", {"reuse": False}, {}),
    "copies + dispatch": ("parts-dispatch:history", _OFF, {}),
    "copies + forecast": ("parts:oracle:1", _OFF, {}),
    "all five": ("parts-dispatch:oracle:1", {}, {}),
    "all but forecast": ("parts-dispatch:history", {}, {}),
    "all but copies": ("parts-dispatch:oracle:1", {}, {"extra_slots": 0}),
    "all but placement": ("parts-dispatch:oracle:1", {"place": False}, {}),
    "all but warm reuse": ("parts-dispatch:oracle:1", {"reuse": False}, {"keep_alive": 0.0}),
    "all but dispatch": ("parts:oracle:1", {}, {}),
}


def _ratios(rows: list[Mapping[str, Any]], colours: str | list[str]) -> Bars:
    """Layer time over the first row's, with intervals."""
    middle_N, low_N, high_N = np.array([serving.ratio(row, rows[0]) for row in rows]).T
    return Bars(middle_N, low_N, high_N, colours)


def _jobs(options: Options) -> Mapping[str, Job]:
    return {
        f"{source.key}|{costs}|{variant}": serving.job(
            options, source, policy or serving.moeless_policy(source), costs, **changes
        )
        for source in sweep_sources(options)
        for costs in options.costs
        for variant, (policy, changes) in VARIANTS.items()
    }


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    sources = sweep_sources(options)
    look = style.series([source.title for source in sources])
    plots: dict[str, Plot] = {}
    rows: list[tuple[tuple[str, str, str], Cell]] = []
    findings = []
    for costs in options.costs:
        series, slower = {}, {}
        for source in sources:
            kept = [results[f"{source.key}|{costs}|{name}"] for name in VARIANTS]
            found = [serving.cell(data) for data in kept]
            rows += [((source.title, costs, name), one) for name, one in zip(VARIANTS, found, strict=True)]
            series[source.title] = _ratios(kept, look[source.title].colour)
            slower[source.title] = serving.change(found[-1].layer.mean_ms, found[0].layer.mean_ms)
        plots[costs] = Plot(
            bars(list(VARIANTS), series, xlabel="mean layer time ÷ full system's", title=f"Ablation, {costs} costs"),
            f"Mean MoE-layer time with one component taken away or replaced, relative to the full system; "
            f"{options.cluster}, {costs} costs (n = {serving.fewest_runs(one for _, one in rows):,} layer runs or more "
            f"a bar). Whiskers: {serving.PAIRED}.",
            common_kind(sources),
            common_label(sources),
        )
        findings.append(
            Finding(
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
        )
    table = serving.table("ablation", ("source", "costs", "variant"), rows, "Each variant", evidence=False)
    return Drawn(plots, {"variants": table}, findings=findings)


def _component_jobs(options: Options) -> Mapping[str, Job]:
    source, made = serving.source_of(options), {}
    for costs in options.costs:
        for variant, (policy, planner, changes) in COMPONENTS.items():
            # copies take time even under the paper's costs: warm reuse is one of the components
            every = {**serving.CONTINUOUS, "instant_copies": False, **changes}
            job = serving.job(options, source, policy, costs, **every, **({"planner": planner} if planner else {}))
            made[f"{variant}, {costs} costs|{policy}"] = dataclasses.replace(
                job,
                label=f"{source.title}: {variant}, {costs} costs",
                function="moeless.experiments.cells.parts:serve",
            )
    return made


def _components(options: Options, results: Mapping[str, Any]) -> Drawn:
    source = serving.source_of(options)
    colours = [style.SERIES[7 if name == "static EP" else 2 if name.startswith("all") else 0] for name in COMPONENTS]
    pairs, plots, text = [], {}, []
    for costs in options.costs:
        mine = [(f"{variant}, {costs} costs", policy) for variant, (policy, _, _) in COMPONENTS.items()]
        pairs += mine
        found = {name: serving.found(results, *pair) for name, pair in zip(COMPONENTS, mine, strict=True)}
        plots[costs] = Plot(
            bars(
                list(COMPONENTS),
                {"": _ratios([results["|".join(pair)] for pair in mine], colours)},
                xlabel="mean layer time ÷ static EP's",
                title=f"Each component, {costs} costs",
                digits=3,
            ),
            f"Mean MoE-layer time of static EP with one component added, and of all five with one taken away, relative "
            f"to static EP; {source.title}, {source.cluster or options.cluster}, {costs} costs, continuous batching "
            f"(n = {serving.fewest_runs(found.values()):,} layer runs or more a bar). Whiskers: {serving.PAIRED}.",
            common_kind([source]),
            common_label([source]),
        )
        times = {name: one.layer.mean_ms for name, one in found.items()}
        full = times["all five"]
        worth = {name.removeprefix("all but "): times[name] / full for name in times if name.startswith("all but ")}
        order = sorted(worth, key=lambda name: -worth[name])
        text.append(
            f"{costs} costs: all five together change static EP's layer time by "
            f"{serving.change_text(full, times['static EP'])}; taking one away multiplies it by "
            + ", ".join(f"{worth[name]:.3f} ({name})" for name in order)
            + "."
        )
    text.append(
        "A forecast, warm reuse or dispatch alone is static EP itself: without copies or another placement there is "
        "nothing to forecast for, to reuse or to choose between. They are shown together with copies."
    )
    data = {"variants": serving.settings(results, pairs, "Each variant")}
    return Drawn(plots, data, text=text, warnings=serving.warnings(results))


EXPERIMENTS = (
    Experiment(
        name="fig17",
        title="Figure 17: ablation",
        question="What is each component worth?",
        stated="One variant without prediction, scaling and placement is slower.",
        jobs=_jobs,
        draw=_draw,
    ),
    Experiment(
        name="components",
        title="Beyond the paper: each component alone",
        question="What are forecast, copies, placement, warm reuse and dispatch worth, each alone?",
        stated="Only one variant without prediction, scaling and placement is shown, and it is slower.",
        jobs=_component_jobs,
        draw=_components,
    ),
)
