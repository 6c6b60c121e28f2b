"""Figure 13: layer time against prediction distance."""

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
        lambda one: one.layer.mean_ms,
        xlabel="prediction distance d (layers)",
        ylabel="mean layer time (ms)",
        title="Layer time over distance",
        relative=True,
    )


EXPERIMENT = Experiment(
    name="fig13",
    title="Figure 13: layer time against prediction distance",
    question="What does looking further ahead cost in time?",
    stated="Layer time rises with the distance d, 1 to 5.",
    jobs=sweeps.distance_jobs,
    draw=_draw,
)
