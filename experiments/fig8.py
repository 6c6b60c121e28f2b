"""Figure 8: distribution of MoE-layer time, LMSYS-Chat-1M."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeless.experiments import latency_figures
from moeless.experiments.base import Drawn, Experiment, Options


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    return latency_figures.draw(options, results, "lmsys", "fig8")


EXPERIMENT = Experiment(
    name="fig8",
    title="Figure 8: MoE-layer time, LMSYS-Chat-1M",
    question="How long does a MoE layer take under each system?",
    stated="Over both data sets MoEless is 43.19 % below Megatron-LM and 21.89 % below EPLB in mean layer time.",
    jobs=latency_figures.jobs,
    draw=_draw,
)
