"""Figure 15: layer time against the threshold V."""

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
        lambda one: one.layer.mean_ms,
        xlabel="threshold V on the coefficient of variation",
        ylabel="mean layer time (ms)",
        title="Layer time over V",
        relative=True,
    )


EXPERIMENT = Experiment(
    name="fig15",
    title="Figure 15: layer time against the threshold V",
    question="How evenly must replica loads lie?",
    stated="A larger V (0.2 to 1.0) is slower.",
    jobs=sweeps.threshold_jobs,
    draw=_draw,
)
