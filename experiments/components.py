"""Each component alone: what forecast, copies, placement, warm reuse and dispatch are worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments import serving, study
from moeless.experiments.base import Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import common_kind, common_label
from moeless.report import style
from moeless.report.bar_figures import Bars, bars

_OFF = {"place": False, "reuse": False}
#: Variant to (policy, planner parameters, changes of the workload). The forecast is perfect where there is one: it is
#: the most that any predictor can be worth.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
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


def _jobs(options: Options) -> Mapping[str, Job]:
    source, made = study.source_of(options), {}
    for costs in options.costs:
        for variant, (policy, planner, changes) in VARIANTS.items():
            # copies take time even under the paper's costs: warm reuse is one of the components
            changes = {**study.CONTINUOUS, "instant_copies": False, **changes} | (
                {"planner": planner} if planner else {}
            )
            job = serving.job(options, source, policy, costs, **changes)
            label = f"{source.title}: {variant}, {costs} costs"
            made[f"{variant}, {costs} costs|{policy}"] = dataclasses.replace(
                job, label=label, function="moeless.experiments.cells.parts:serve"
            )
    return made


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    source = study.source_of(options)
    rows, plots, text = [], {}, []
    for costs in options.costs:
        found = {
            variant: study.found(results, f"{variant}, {costs} costs", policy)
            for variant, (policy, _, _) in VARIANTS.items()
        }
        rows += [study.row(f"{variant}, {costs} costs", one.policy, one) for variant, one in found.items()]
        times = {variant: one.layer.mean_ms for variant, one in found.items()}
        kept = {name: results[f"{name}, {costs} costs|{policy}"] for name, (policy, _, _) in VARIANTS.items()}
        ratios = {name: serving.ratio(row, kept["static EP"]) for name, row in kept.items()}
        runs = min(one.layer.samples for one in found.values())
        plots[costs] = Plot(
            _figure(ratios, costs),
            f"Mean MoE-layer time of static EP with one component added, and of all five with one taken away, relative "
            f"to static EP; {source.title}, {source.cluster or options.cluster}, {costs} costs, continuous batching "
            f"(n = {runs:,} layer runs or more a bar). Whiskers: {serving.PAIRED}.",
            common_kind([source]),
            common_label([source]),
        )
        full = times["all five"]
        worth = {name.removeprefix("all but "): times[name] / full for name in times if name.startswith("all but ")}
        order = sorted(worth, key=lambda name: -worth[name])
        text.append(
            f"{costs} costs: all five together change static EP's layer time by "
            f"{study.change(full, times['static EP'])}; taking one away multiplies it by "
            + ", ".join(f"{worth[name]:.3f} ({name})" for name in order)
            + "."
        )
    text.append(
        "A forecast, warm reuse or dispatch alone is static EP itself: without copies or another placement there is "
        "nothing to forecast for, to reuse or to choose between. They are shown together with copies."
    )
    data = {"variants": dataclasses.replace(study.table({}, (), (), "Each variant"), rows=rows)}
    return Drawn(plots, data, text=text, warnings=study.warnings(results))


def _figure(ratios: Mapping[str, tuple[float, float, float]], costs: str) -> Any:
    colours = [style.SERIES[7 if name == "static EP" else 2 if name.startswith("all") else 0] for name in ratios]
    ratio_N3 = np.array(list(ratios.values()))
    one = Bars(ratio_N3[:, 0], colours, ratio_N3[:, 1], ratio_N3[:, 2])
    return bars(
        list(ratios),
        {"": one},
        xlabel="mean layer time ÷ static EP's",
        title=f"Each component, {costs} costs",
        digits=3,
    )


EXPERIMENT = Experiment(
    name="components",
    title="Beyond the paper: each component alone",
    question="What are forecast, copies, placement, warm reuse and dispatch worth, each alone?",
    stated="Only one variant without prediction, scaling and placement is shown, and it is slower.",
    jobs=_jobs,
    draw=_draw,
)
