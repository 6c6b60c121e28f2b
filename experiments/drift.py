"""Drift of domains: the same requests mixed, or one domain after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moeless.experiments import serving, study
from moeless.experiments.base import Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import common_kind, common_label
from moeless.report import style
from moeless.report.bar_figures import Bars, bars

MOELESS = ("moeless:history", "moeless:last", "moeless:oracle:1")
POLICIES = ("static", "eplb:history", *MOELESS, "elastic:history")
ORDERS = {"mixed": False, "one domain after the other": True}
#: Seconds between EPLB's plans; the paper's example of ten minutes never plans in a quick run.
REPLAN = {"": 600.0, ", EPLB plans every 2 s": 2.0}


def _points() -> dict[str, dict[str, Any]]:
    return {
        order + pace: {"blocks": blocks, "replan_seconds": seconds}
        for order, blocks in ORDERS.items()
        for pace, seconds in REPLAN.items()
    }


def _policies(label: str) -> tuple[str, ...]:
    return ("eplb:history",) if "EPLB" in label else POLICIES


def _jobs(options: Options) -> Mapping[str, Job]:
    made: dict[str, Job] = {}
    for label, changes in _points().items():
        made |= study.jobs(options, _policies(label), {label: changes}, max_requests=options.pick(24, serving.FULL))
    function = "moeless.experiments.cells.drift:serve"
    return {name: dataclasses.replace(job, function=function) for name, job in made.items()}


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    mixed, blocks = ORDERS
    rows = [
        study.row(label, policy, study.found(results, label, policy))
        for label in _points()
        for policy in _policies(label)
    ]
    text = []
    still, moved = (study.found(results, order, "static").layer.mean_ms for order in (mixed, blocks))
    for policy in POLICIES:
        one, two = (study.found(results, order, policy).layer for order in (mixed, blocks))
        beside = f", {study.change(two.mean_ms / one.mean_ms, moved / still)} beside static EP's change"
        text.append(
            f"{policy}: imbalance {one.imbalance:.3f} mixed, {two.imbalance:.3f} with one domain after the other; "
            f"layer time {study.change(two.mean_ms, one.mean_ms)}{'' if policy == 'static' else beside}."
        )
    two = study.found(results, f"{blocks}, EPLB plans every 2 s", "eplb:history").layer
    text.append(f"eplb:history planning every 2 s: imbalance {two.imbalance:.3f} with one domain after the other.")
    text.append(
        "The order also changes which requests run together, for static EP too: what a policy loses to drift is its "
        "change beside static EP's, not its change alone."
    )
    plots = {"imbalance": _plot(options, results)}
    data = dataclasses.replace(study.table({}, (), (), "The same requests in two orders"), rows=rows)
    return Drawn(plots, {"orders": data}, text=text, warnings=study.warnings(results))


def _plot(options: Options, results: Mapping[str, Any]) -> Plot:
    """Two bars per policy: domains mixed, and one after the other."""
    source = study.source_of(options)
    look = style.looks(POLICIES)
    series = {}
    for label, shade in zip(ORDERS, (0.45, 1.0), strict=True):
        values = [study.found(results, label, policy).layer.imbalance for policy in POLICIES]
        series[label] = Bars(values, [look[policy].colour for policy in POLICIES], alpha=shade)
    figure = bars(
        POLICIES,
        series,
        xlabel="imbalance over GPUs (max ÷ mean)",
        title="Imbalance under drift",
        digits=3,
        reference=None,
        legend=False,
    )
    runs = min(study.found(results, order, policy).layer.samples for order in ORDERS for policy in POLICIES)
    return Plot(
        figure,
        f"Pale: domains mixed; full: one domain after the other. {source.title} on "
        f"{source.cluster or options.cluster}, {study.physical(options)} costs, continuous batching "
        f"(n = {runs:,} layer runs or more a bar).",
        common_kind([source]),
        common_label([source]),
    )


EXPERIMENT = Experiment(
    name="drift",
    title="Beyond the paper: drift of domains",
    question="What happens to plans made from the past when the domain of the requests changes?",
    stated="Two prompt sets are served, each by itself.",
    jobs=_jobs,
    draw=_draw,
)
