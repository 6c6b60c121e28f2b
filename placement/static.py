"""Static expert parallelism: contiguous blocks of experts, one copy each, for ever."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless.contracts import LayerPlan, PlanInput
from moeless.placement.base import Planner
from moeless.placement.dispatch import EVEN
from moeless.placement.layout import check_static_fits, room_G, static_gpu_E
from moeless.placement.setting import Setting


@dataclass(frozen=True)
class StaticParams:
    """Static placement has nothing to set."""


def static_plan(layer: int, num_experts: int, num_gpus: int) -> LayerPlan:
    """The plan of static expert parallelism: primaries only."""
    gpu_E = static_gpu_E(num_experts, num_gpus)
    experts = np.arange(num_experts)
    return LayerPlan.build(
        layer, experts, gpu_E, np.ones(num_experts, np.bool_), num_experts=num_experts, num_gpus=num_gpus
    )


def plan_layer(x: PlanInput, setting: Setting) -> LayerPlan:
    """Contiguous primaries, whatever the forecast.

    Raises:
        UserError: a GPU has no room for its block of experts.
    """
    experts, gpus = setting.spec.E, setting.cluster.num_gpus
    check_static_fits(room_G(setting.budget, setting.spec, gpus), static_gpu_E(experts, gpus))
    return static_plan(x.layer, experts, gpus)


PLANNER = Planner(
    name="static",
    plan_layer=plan_layer,
    dispatch=EVEN,
    params=StaticParams,
    cadence="once",
    needs_forecast=False,
    default_predictor="none",
    source="Megatron-LM: expert e of E on rank e * G // E",
    holds_extras=False,
)
