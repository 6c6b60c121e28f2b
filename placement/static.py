"""Static expert parallelism: contiguous blocks of experts, one copy each, for ever."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless.cluster import Cluster
from moeless.contracts import Budget, LayerPlan, PlanInput
from moeless.costs import CostModel
from moeless.placement.base import Planner
from moeless.placement.dispatch import EVEN
from moeless.placement.layout import check_static_fits, room_G, static_gpu_E
from moeless.spec import MoESpec


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


def plan_layer(
    x: PlanInput, *, spec: MoESpec, cluster: Cluster, costs: CostModel, budget: Budget, params: StaticParams
) -> LayerPlan:
    """Contiguous primaries, whatever the forecast.

    Raises:
        UserError: a GPU has no room for its block of experts.
    """
    check_static_fits(room_G(budget, spec, cluster.num_gpus), static_gpu_E(spec.E, cluster.num_gpus))
    return static_plan(x.layer, spec.E, cluster.num_gpus)


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
