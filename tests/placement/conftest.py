"""Inputs that several planners' tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moeless.cluster import Cluster, cluster
from moeless.contracts import Budget, Forecast, LayerPlan, Phase, PlanInput
from moeless.costs import COSTS
from moeless.placement import PLANNERS
from moeless.placement.setting import Setting
from moeless.spec import Attention, MoESpec


def make_spec(num_experts: int, hidden: int = 2880) -> MoESpec:
    """One MoE layer of gpt-oss-like experts in bf16."""
    return MoESpec(
        name=f"test-{num_experts}",
        hidden_size=hidden,
        num_layers=1,
        moe_layers=(0,),
        num_experts=num_experts,
        top_k=1,
        expert_intermediate_size=hidden,
        attention=Attention(8, 8, 64),
        vocab_size=1000,
    )


def make_cluster(num_gpus: int) -> Cluster:
    """H100s on one switch."""
    return cluster("h100x8").with_gpus(num_gpus)


def make_setting(
    name: str,
    num_experts: int,
    gpus: int,
    extra_slots: int = 1,
    *,
    costs: str = "roofline",
    budget: Budget | None = None,
    **params: Any,
) -> Setting:
    """What a planner of :func:`make_spec` on :func:`make_cluster` is given."""
    spec, machine = make_spec(num_experts), make_cluster(gpus)
    room = budget or Budget.even(num_experts, gpus, extra_slots, spec.expert_bytes)
    return Setting(spec, machine, COSTS.get(costs)(spec, machine), room, PLANNERS.get(name).params(**params))


@pytest.fixture(scope="session")
def plan_with() -> Callable[..., LayerPlan]:
    """Plan one layer by name: ``plan_with("eplb", mean_E, gpus, extra_slots)``."""

    def plan(
        name: str,
        mean_E: Any,
        gpus: int,
        extra_slots: int = 1,
        *,
        previous: LayerPlan | None = None,
        state_R: Any = None,
        budget: Budget | None = None,
        costs: str = "roofline",
        phase: Phase = Phase.PREFILL,
        var_E: Any = None,
        **params: Any,
    ) -> LayerPlan:
        mean = np.asarray(mean_E, np.float64)
        setting = make_setting(name, len(mean), gpus, extra_slots, costs=costs, budget=budget, **params)
        variance = np.zeros_like(mean) if var_E is None else np.asarray(var_E, np.float64)
        forecast = Forecast(mean, variance, int(mean.sum()), "test")
        return PLANNERS.get(name).plan(PlanInput(0, phase, forecast, previous, state_R), setting)

    return plan


@pytest.fixture(scope="session")
def dispatch_with() -> Callable[..., Any]:
    """Quotas by a planner's dispatch at its defaults: ``dispatch_with("metro", load_SE, plan, usable_R)``."""

    def dispatch(name: str, load_SE: Any, plan: LayerPlan, usable_R: Any = None, costs: str = "roofline") -> Any:
        load = np.asarray(load_SE, np.int64)
        usable = np.ones(plan.R, np.bool_) if usable_R is None else usable_R
        setting = make_setting(name, load.shape[1], load.shape[0], costs=costs)
        return PLANNERS.get(name).dispatch(load, plan, usable, setting)

    return dispatch
