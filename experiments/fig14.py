"""Figure 14: replicas against prediction distance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeless.experiments import sweeps
from moeless.experiments.base import Drawn, Experiment, Options


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    return sweeps.draw(
        options,
        results,
        sweeps.DISTANCES,
        lambda one: one.layer.replicas,
        xlabel="prediction distance d (layers)",
        ylabel="replicas per layer",
        title="Replicas over distance",
    )


EXPERIMENT = Experiment(
    name="fig14",
    title="Figure 14: replicas against prediction distance",
    question="How many copies does a layer have when the forecast looks further ahead?",
    stated="The mean number of replicas per layer falls with the distance d, 1 to 5.",
    jobs=sweeps.distance_jobs,
    draw=_draw,
)
