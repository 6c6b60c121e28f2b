"""Planning every layer of a model at once.

Axes: L layers, E experts, G GPUs, S source ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless.contracts import Forecast, IntArray, ModelPlan, Phase, PlanInput
from moeless.errors import UserError
from moeless.placement.base import Planner
from moeless.placement.fastest_dispatch import spread_evenly
from moeless.placement.setting import Setting
from moeless.placement.static import static_plan


@dataclass(frozen=True)
class PlanSummary:
    """What a plan does to the loads that it was made for, means over layers.

    Attributes:
        imbalance, static_imbalance: maximum over mean of GPU tokens.
        seconds, static_seconds: a layer's time under the cost model.
        extra_bytes: memory of all extras, over layers and GPUs.
    """

    extras: int
    extra_bytes: int
    imbalance: float
    static_imbalance: float
    seconds: float
    static_seconds: float


def plan_model(
    planner: Planner,
    forecast_L: Sequence[Forecast],
    setting: Setting,
    *,
    phase: Phase,
    previous: ModelPlan | None = None,
    horizon_iterations: int = 0,
    notes: Mapping[str, Any] | None = None,
) -> ModelPlan:
    """Plan each layer for its forecast.

    Raises:
        UserError: the forecasts are not one per MoE layer, or the planner refuses the budget.
    """
    spec = setting.spec
    if len(forecast_L) != spec.L:
        raise UserError(f"{spec.name} has {spec.L} MoE layers, {len(forecast_L)} forecasts were given")
    inputs = [
        PlanInput(
            layer, phase, forecast, None if previous is None else previous.layers[layer], None, horizon_iterations
        )
        for layer, forecast in enumerate(forecast_L)
    ]
    layers = planner.plan_all(inputs, setting)
    return ModelPlan(spec.name, spec.E, setting.cluster.num_gpus, planner.name, tuple(layers), dict(notes or {}))


def spread_over_sources(load_E: IntArray, num_sources: int) -> IntArray:
    """Each expert's tokens as if every rank had sent the same number, ``[S, E]``; the rest goes round."""
    load_SE = np.empty((num_sources, len(load_E)), np.int64)
    spread_evenly(np.asarray(load_E, np.int64), load_SE)
    return load_SE


def summarise(
    plan: ModelPlan,
    planner: Planner,
    forecast_L: Sequence[Forecast],
    setting: Setting,
) -> PlanSummary:
    """Judge a plan on the expected loads, tokens spread evenly over source ranks."""
    spec, gpus, figures = setting.spec, setting.cluster.num_gpus, []
    for layer, forecast in zip(plan.layers, forecast_L, strict=True):
        load_SE = spread_over_sources(np.rint(forecast.mean_E).astype(np.int64), gpus)
        row = []
        for candidate in (layer, static_plan(layer.layer, spec.E, gpus)):
            usable_R = np.ones(candidate.R, np.bool_)
            quota_SR = planner.dispatch(load_SE, candidate, usable_R, setting)
            tokens_G = np.bincount(candidate.gpu_R, weights=quota_SR.sum(0), minlength=gpus)
            seconds = setting.costs.layer_seconds(quota_SR, candidate).total
            row += [tokens_G.max() / max(tokens_G.mean(), 1e-12), seconds]
        figures.append(row)
    imbalance, planned, static_imbalance, static = np.mean(figures, axis=0).tolist()
    extras = sum(layer.num_extra for layer in plan.layers)
    return PlanSummary(extras, extras * spec.expert_bytes, imbalance, static_imbalance, planned, static)
