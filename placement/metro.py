"""METRO: balance activated experts, not tokens, where weight reads decide (decode).

Source: Yu et al., "Efficient MoE Serving in the Memory-Bound Regime: Balance Activated Experts, Not Tokens",
arXiv 2512.09277 (vLLM on 8 A100), known from its abstract and from what others write of it, not from its text: the
placement stays EPLB's; what differs is the routing after the gate, for which all ranks gather all top-k choices: it
minimises the experts that a GPU activates and is close to optimal. Its algorithm is not known to us. Our greedy
reading: each expert with tokens uses one copy only; experts with the fewest copies choose first, each the GPU with the
fewest activated experts, then with the fewest tokens, then the lowest.

Axes: S source ranks, E experts, R replicas, G GPUs.
"""

from __future__ import annotations

import numpy as np

from moeless.cluster import Cluster
from moeless.contracts import BoolArray, IntArray, LayerPlan
from moeless.costs import CostModel
from moeless.jit import njit
from moeless.placement.base import DispatchRule, Planner
from moeless.placement.dispatch import serving_R
from moeless.placement.eplb import EplbParams, plan_layer
from moeless.spec import MoESpec


@njit(cache=True, nogil=True)
def _route(load_SE, expert_R, gpu_R, serving, num_gpus, quota_SR):  # type: ignore[no-untyped-def]
    num_sources, num_experts = load_SE.shape
    load_E, copies_E = np.zeros(num_experts, np.int64), np.zeros(num_experts, np.int64)
    for s in range(num_sources):
        for e in range(num_experts):
            load_E[e] += load_SE[s, e]
    for r in range(len(expert_R)):
        if serving[r]:
            copies_E[expert_R[r]] += 1
    active_G, tokens_G = np.zeros(num_gpus, np.int64), np.zeros(num_gpus, np.int64)
    # fewest copies first, most tokens first among those
    order = np.argsort(copies_E * (load_E.max() + 1) - load_E, kind="mergesort")
    for e in order:
        if load_E[e] == 0:
            continue
        best = -1
        for r in range(len(expert_R)):
            if expert_R[r] == e and serving[r]:
                g, h = gpu_R[r], gpu_R[best]
                if best < 0 or active_G[g] < active_G[h] or (active_G[g] == active_G[h] and tokens_G[g] < tokens_G[h]):
                    best = r
        active_G[gpu_R[best]] += 1
        tokens_G[gpu_R[best]] += load_E[e]
        for s in range(num_sources):
            quota_SR[s, best] = load_SE[s, e]


def dispatch(
    load_SE: IntArray,
    plan: LayerPlan,
    usable_R: BoolArray,
    *,
    spec: MoESpec,
    cluster: Cluster,
    costs: CostModel,
    params: EplbParams,
) -> IntArray:
    """One copy of each expert with tokens, activated experts balanced over GPUs, ``[S, R]`` tokens.

    Raises:
        UserError: ``usable_R`` does not match the plan.
    """
    load_SE = np.ascontiguousarray(load_SE, np.int64)
    quota_SR = np.zeros((load_SE.shape[0], plan.R), np.int64)
    serving = serving_R(plan, usable_R, load_SE.shape[1])
    _route(load_SE, plan.expert_R, plan.gpu_R, serving, cluster.num_gpus, quota_SR)
    return quota_SR


PLANNER = Planner(
    name="metro",
    plan_layer=plan_layer,
    dispatch=DispatchRule(dispatch, gathers_counts=True),
    params=EplbParams,
    cadence="interval",
    needs_forecast=True,
    default_predictor="history",
    source="METRO, arXiv 2512.09277; placement by EPLB",
)
