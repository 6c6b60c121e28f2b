"""Host times of planning a layer ahead and of dispatching it after the gate."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from moeless.jit import COMPILED
from moeless.spec import MoESpec

RANKS = 8
TOKENS = 1024
REPETITIONS = 40


def measure_control(spec: MoESpec, planners: tuple[str, ...] = ("eplb", "moeless", "elastic")) -> dict[str, Any]:
    """A profile's ``control``: seconds of planning a layer and of ``dispatch`` of each planner.

    One layer of 8 ranks, skewed loads (expert i has 1 / i of the first one's), one slot of extras a rank, compiled
    functions warmed up. Empty where the planners' compiler is not installed.
    """
    if not COMPILED:
        return {"dispatch_seconds": {}, "plan_seconds": {}}
    from moeless.cluster import cluster
    from moeless.contracts import Budget, Forecast, Phase, PlanInput
    from moeless.costs.roofline import RooflineCosts
    from moeless.placement import PLANNERS
    from moeless.placement.setting import Setting

    machine = cluster("h100x8")
    costs = RooflineCosts(spec, machine)
    share_E = 1.0 / np.arange(1, spec.E + 1)
    share_E = np.random.default_rng(0).permutation(share_E / share_E.sum())
    mean_E = share_E * TOKENS * spec.K
    load_SE = np.random.default_rng(1).poisson(np.tile(mean_E / RANKS, (RANKS, 1))).astype(np.int64)
    ahead = PlanInput(0, Phase.PREFILL, Forecast(mean_E, mean_E, TOKENS, "profile"))
    budget = Budget.even(spec.E, RANKS, 1, spec.expert_bytes)
    dispatch, plan = {}, {}
    for planner in map(PLANNERS.get, planners):
        setting = Setting(spec, machine, costs, budget, planner.params())
        plan_one = partial(planner.plan, ahead, setting)
        made = plan_one()
        plan[planner.timed_as] = _median(plan_one)
        usable_R = np.ones(made.R, np.bool_)
        dispatch[planner.timed_as] = _median(partial(planner.dispatch, load_SE, made, usable_R, setting))
    return {"dispatch_seconds": dispatch, "plan_seconds": plan}


def _median(call: Callable[[], object]) -> float:
    """Processor time of one call, median."""
    seconds = np.zeros(REPETITIONS)
    for i in range(REPETITIONS):
        start = time.thread_time()
        call()
        seconds[i] = time.thread_time() - start
    return float(np.median(seconds[5:]))
