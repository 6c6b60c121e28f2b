"""Figure 9: distribution of MoE-layer time, ShareGPT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeless.experiments import latency_figures
from moeless.experiments.base import Drawn, Experiment, Options


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    return latency_figures.draw(options, results, "sharegpt", "fig9")


EXPERIMENT = Experiment(
    name="fig9",
    title="Figure 9: MoE-layer time, ShareGPT",
    question="How long does a MoE layer take under each system?",
    stated="Over both data sets MoEless is 43.19 % below Megatron-LM and 21.89 % below EPLB in mean layer time.",
    jobs=latency_figures.jobs,
    draw=_draw,
)
