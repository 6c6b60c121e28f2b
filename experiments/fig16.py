"""Figure 16: replicas against the threshold V."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeless.experiments import sweeps
from moeless.experiments.base import Drawn, Experiment, Options


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    return sweeps.draw(
        options,
        results,
        sweeps.THRESHOLDS,
        lambda one: one.layer.replicas,
        xlabel="threshold V on the coefficient of variation",
        ylabel="replicas per layer",
        title="Replicas over V",
    )


EXPERIMENT = Experiment(
    name="fig16",
    title="Figure 16: replicas against the threshold V",
    question="How many copies does each threshold need?",
    stated="A larger V (0.2 to 1.0) needs fewer replicas.",
    jobs=sweeps.threshold_jobs,
    draw=_draw,
)
