"""DeepSeek's Expert Parallelism Load Balancer: replicate hot experts by past load, pack copies onto GPUs.

Source: github.com/deepseek-ai/EPLB, described in the DeepSeek-V3 report (arXiv 2412.19437, section 3.4).

Single precision throughout, as in DeepSeek's published program, so that near-ties fall the same way.

Axes: L layers, E experts, Q groups of experts, N experts of a node, P replicas (physical experts), X copies of an
expert, G GPUs or bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import IntArray, LayerPlan, PlanInput
from moeless.errors import UserError
from moeless.jit import njit
from moeless.placement.base import Planner
from moeless.placement.dispatch import EVEN
from moeless.placement.layout import room_G, spare_replicas
from moeless.placement.setting import Setting

Float32Array = NDArray[np.float32]


@dataclass(frozen=True)
class EplbParams:
    """Parameters of both EPLB planners.

    Attributes:
        num_groups: expert groups of the router (hierarchical only); 0 takes one group per node.
    """

    num_groups: int = 0


class Replicas(NamedTuple):
    """Expert, rank among its expert's copies and weight of each replica; copies of each expert."""

    expert_P: IntArray
    rank_P: IntArray
    weight_P: Float32Array
    count_E: IntArray


@njit(cache=True, nogil=True)
def replicate(weight_E: Float32Array, num_replicas: int) -> Replicas:
    """Copies one by one for the expert with the most weight per copy; ties to the lowest index."""
    num_experts = len(weight_E)
    expert_P, rank_P = np.empty(num_replicas, np.int64), np.empty(num_replicas, np.int64)
    count_E, weight_P, each_E = np.zeros(num_experts, np.int64), np.empty(num_replicas, np.float32), weight_E.copy()
    for p in range(num_replicas):
        hottest = p
        if p >= num_experts:
            hottest = 0
            for e in range(1, num_experts):
                if each_E[e] > each_E[hottest]:
                    hottest = e
        expert_P[p], rank_P[p] = hottest, count_E[hottest]
        count_E[hottest] += 1
        each_E[hottest] = weight_E[hottest] / np.float32(count_E[hottest])
    for p in range(num_replicas):
        weight_P[p] = each_E[expert_P[p]]
    return Replicas(expert_P, rank_P, weight_P, count_E)


@njit(cache=True, nogil=True)
def pack(weight_P: Float32Array, capacity_G: IntArray) -> tuple[IntArray, IntArray]:
    """Heaviest item first into the lightest bin that has room, ties to the lowest index: bins and places in them."""
    bins, items = len(capacity_G), len(weight_P)
    bin_P, slot_P = np.arange(items), np.zeros(items, np.int64)
    single = items == bins
    for g in range(bins):
        single = single and capacity_G[g] == 1
    if single:
        return bin_P, slot_P
    weight_G, used_G = np.zeros(bins, np.float32), np.zeros(bins, np.int64)
    for p in np.argsort(-weight_P, kind="mergesort"):
        lightest = -1
        for g in range(bins):
            if used_G[g] < capacity_G[g] and (lightest < 0 or weight_G[g] < weight_G[lightest]):
                lightest = g
        bin_P[p], slot_P[p] = lightest, used_G[lightest]
        used_G[lightest] += 1
        weight_G[lightest] += weight_P[p]
    return bin_P, slot_P


@njit(cache=True, nogil=True)
def _rebalance(
    weight_LE: Float32Array, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[IntArray, IntArray, IntArray]:
    """All layers: groups to nodes, copies inside a node, copies to the node's GPUs."""
    num_layers, num_experts = weight_LE.shape
    group_size, node_experts = num_experts // num_groups, num_experts // num_nodes
    node_replicas, slots = num_replicas // num_nodes, num_replicas // num_gpus
    node_groups = num_groups // num_nodes
    groups_of_node, slots_G = np.full(num_nodes, node_groups, np.int64), np.full(num_gpus // num_nodes, slots, np.int64)
    expert_LP = np.empty((num_layers, num_replicas), np.int64)
    rank_LP, count_LE = np.empty_like(expert_LP), np.empty((num_layers, num_experts), np.int64)
    weight_Q, weight_N = np.empty(num_groups, np.float32), np.empty(node_experts, np.float32)
    # node by node, the experts of its groups
    member_E = np.empty(num_experts, np.int64)
    for layer in range(num_layers):
        for q in range(num_groups):
            weight_Q[q] = weight_LE[layer, q * group_size : (q + 1) * group_size].sum()
        node_Q, place_Q = pack(weight_Q, groups_of_node)
        for q in range(num_groups):
            for i in range(group_size):
                member_E[(node_Q[q] * node_groups + place_Q[q]) * group_size + i] = q * group_size + i
        for node in range(num_nodes):
            member_N = member_E[node * node_experts : (node + 1) * node_experts]
            for i in range(node_experts):
                weight_N[i] = weight_LE[layer, member_N[i]]
            expert_P, rank_P, weight_P, count_N = replicate(weight_N, node_replicas)
            gpu_P, slot_P = pack(weight_P, slots_G)
            for p in range(node_replicas):
                at = node * node_replicas + gpu_P[p] * slots + slot_P[p]
                expert_LP[layer, at], rank_LP[layer, at] = member_N[expert_P[p]], rank_P[p]
            for i in range(node_experts):
                count_LE[layer, member_N[i]] = count_N[i]
    return expert_LP, rank_LP, count_LE


def rebalance_experts(
    weight_LE: NDArray[np.generic], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[IntArray, IntArray, IntArray]:
    """Plan all layers, in DeepSeek's calling convention.

    Hierarchical where ``num_groups`` is a multiple of ``num_nodes`` (a group's experts stay on one node), global
    otherwise. Ties go to the lowest index.

    Args:
        weight_LE: past load of each expert.
        num_replicas: replicas of a layer, a multiple of ``num_gpus``; slot ``p`` is on GPU ``p // (P / G)``.

    Returns:
        ``phy2log`` ``[L, P]`` expert of each slot, ``log2phy`` ``[L, E, X]`` slots of each expert (-1 pads),
        ``logcnt`` ``[L, E]`` copies of each expert.

    Raises:
        UserError: the sizes do not divide, or a load is negative or not finite.
    """
    weights = np.ascontiguousarray(weight_LE, np.float32)
    if weights.ndim != 2:
        raise UserError(f"EPLB needs loads of shape (layers, experts), got {weights.shape}")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise UserError("EPLB needs finite loads of at least 0")
    layers, experts = weights.shape
    if min(num_replicas, num_groups, num_nodes, num_gpus) < 1 or experts < 1:
        raise UserError("EPLB needs at least one expert, replica, group, node and GPU")
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    for what, number, divisor in (
        ("replicas", num_replicas, num_gpus),
        ("GPUs", num_gpus, num_nodes),
        ("experts", experts, num_groups),
    ):
        if number % divisor:
            raise UserError(f"EPLB: {number} {what} do not divide evenly by {divisor}")
    if num_replicas < experts:
        raise UserError(f"EPLB: {num_replicas} replicas are too few for {experts} experts")
    phy2log, rank, logcnt = _rebalance(weights, num_replicas, num_groups, num_nodes, num_gpus)
    log2phy = np.full((layers, experts, int(logcnt.max(initial=1))), -1, np.int64)
    log2phy[np.arange(layers)[:, None], phy2log, rank] = np.arange(num_replicas)
    return phy2log, log2phy, logcnt


def capacities(total: int, room: IntArray) -> IntArray:
    """Slots as equal as the room allows, summing to ``total``; the lowest GPUs take the rest."""
    capacity = np.zeros_like(room)
    left = total
    while left:
        open_G = np.flatnonzero(capacity < room)
        level = max(left // len(open_G), 1)
        for g in open_G:
            take = min(level, int(room[g] - capacity[g]), left)
            capacity[g] += take
            left -= take
    return capacity


def plan_layer(x: PlanInput, setting: Setting) -> LayerPlan:
    """Global balancing: all extras that fit, the first copy of each expert is its primary.

    Raises:
        UserError: the experts do not fit.
    """
    spec, cluster, budget = setting.spec, setting.cluster, setting.budget
    room = room_G(budget, spec, cluster.num_gpus)
    total = spec.E + spare_replicas(room, spec.E, budget.max_extra)
    expert_P, rank_P, weight_P, _ = replicate(x.forecast.mean_E.astype(np.float32), total)
    gpu_P, _ = pack(weight_P, capacities(total, room))
    return LayerPlan.build(x.layer, expert_P, gpu_P, rank_P == 0, num_experts=spec.E, num_gpus=cluster.num_gpus)


def plan_layer_hierarchical(x: PlanInput, setting: Setting) -> LayerPlan:
    """Groups of experts to nodes first, then copies and GPUs inside each node.

    Falls back to the global form where nodes, groups or equal slots do not divide, as DeepSeek's program does.

    Raises:
        UserError: the experts do not fit.
    """
    spec, cluster, budget, params = setting.spec, setting.cluster, setting.budget, setting.params
    nodes, gpus = cluster.num_nodes, cluster.num_gpus
    groups = params.num_groups or nodes
    room = room_G(budget, spec, gpus)
    slots = min(int(room.min()), (spec.E + spare_replicas(room, spec.E, budget.max_extra)) // gpus)
    if groups % nodes or gpus % nodes or spec.E % groups or slots * gpus < spec.E:
        return plan_layer(x, setting)
    phy2log, log2phy, _ = rebalance_experts(x.forecast.mean_E[None], slots * gpus, groups, nodes, gpus)
    slot_P = np.arange(slots * gpus)
    return LayerPlan.build(
        x.layer,
        phy2log[0],
        slot_P // slots,
        log2phy[0, phy2log[0], 0] == slot_P,
        num_experts=spec.E,
        num_gpus=gpus,
    )


PLANNER = Planner(
    name="eplb",
    plan_layer=plan_layer,
    dispatch=EVEN,
    params=EplbParams,
    cadence="interval",
    needs_forecast=True,
    default_predictor="history",
    source="github.com/deepseek-ai/EPLB, global policy; arXiv 2412.19437",
    timed_as="eplb",
)
HIERARCHICAL = Planner(
    name="eplb-hierarchical",
    plan_layer=plan_layer_hierarchical,
    dispatch=EVEN,
    params=EplbParams,
    cadence="interval",
    needs_forecast=True,
    default_predictor="history",
    source="github.com/deepseek-ai/EPLB, hierarchical policy; arXiv 2412.19437",
)
