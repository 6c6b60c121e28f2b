"""DeepSeek's Expert Parallelism Load Balancer: replicate hot experts by past load, pack copies onto GPUs.

Source: github.com/deepseek-ai/EPLB, described in the DeepSeek-V3 report (arXiv 2412.19437, section 3.4).

Single precision throughout, as in DeepSeek's published program, so that near-ties fall the same way.

Axes: L layers, E experts, N experts of a node, P replicas (physical experts), X copies of an expert, G GPUs or bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeless.cluster import Cluster
from moeless.contracts import Budget, IntArray, LayerPlan, PlanInput
from moeless.costs import CostModel
from moeless.errors import UserError
from moeless.jit import njit
from moeless.placement.base import Planner
from moeless.placement.dispatch import EVEN
from moeless.placement.layout import room_G, spare_replicas
from moeless.spec import MoESpec


@dataclass(frozen=True)
class EplbParams:
    """Parameters of both EPLB planners.

    Attributes:
        num_groups: expert groups of the router (hierarchical only); 0 takes one group per node.
    """

    num_groups: int = 0


@njit(cache=True, nogil=True)
def replicate(weight_E, num_replicas, expert_P, rank_P, count_E):  # type: ignore[no-untyped-def]
    """Copies one by one for the expert with the most weight per copy; ties to the lowest index."""
    num_experts = len(weight_E)
    ratio = np.empty(num_experts, np.float32)
    for e in range(num_experts):
        expert_P[e], rank_P[e], count_E[e] = e, 0, 1
        ratio[e] = weight_E[e]
    for p in range(num_experts, num_replicas):
        best = 0
        for e in range(1, num_experts):
            if ratio[e] > ratio[best]:
                best = e
        expert_P[p], rank_P[p] = best, count_E[best]
        count_E[best] += 1
        ratio[best] = weight_E[best] / np.float32(count_E[best])


@njit(cache=True, nogil=True)
def pack(weight_P, capacity_G, bin_P, slot_P):  # type: ignore[no-untyped-def]
    """Heaviest item first into the lightest bin that has room; ties to the lowest index."""
    bins = len(capacity_G)
    single = True
    for g in range(bins):
        single = single and capacity_G[g] == 1
    if single and len(weight_P) == bins:
        for p in range(len(weight_P)):
            bin_P[p], slot_P[p] = p, 0
        return
    order = np.argsort(-weight_P, kind="mergesort")
    total = np.zeros(bins, np.float32)
    used = np.zeros(bins, np.int64)
    for p in order:
        best = -1
        for g in range(bins):
            if used[g] < capacity_G[g] and (best < 0 or total[g] < total[best]):
                best = g
        bin_P[p], slot_P[p] = best, used[best]
        used[best] += 1
        total[best] += weight_P[p]


@njit(cache=True, nogil=True)
def rebalance(weight_LE, num_replicas, num_groups, num_nodes, num_gpus, expert_LP, rank_LP, count_LE):  # type: ignore[no-untyped-def]
    """All layers: groups to nodes, copies inside a node, copies to the node's GPUs."""
    num_layers, num_experts = weight_LE.shape
    group_size = num_experts // num_groups
    groups_per_node = num_groups // num_nodes
    experts_per_node = num_experts // num_nodes
    replicas_per_node = num_replicas // num_nodes
    gpus_per_node = num_gpus // num_nodes
    slots = num_replicas // num_gpus

    group_weight = np.empty(num_groups, np.float32)
    node_of, place_of = np.empty(num_groups, np.int64), np.empty(num_groups, np.int64)
    node_room = np.full(num_nodes, groups_per_node, np.int64)
    gpu_room = np.full(gpus_per_node, slots, np.int64)
    member = np.empty(num_experts, np.int64)
    weight_N = np.empty(experts_per_node, np.float32)
    expert_P, rank_P = np.empty(replicas_per_node, np.int64), np.empty(replicas_per_node, np.int64)
    count_N = np.empty(experts_per_node, np.int64)
    weight_P = np.empty(replicas_per_node, np.float32)
    bin_P, slot_P = np.empty(replicas_per_node, np.int64), np.empty(replicas_per_node, np.int64)

    for layer in range(num_layers):
        for q in range(num_groups):
            group_weight[q] = weight_LE[layer, q * group_size : (q + 1) * group_size].sum()
        pack(group_weight, node_room, node_of, place_of)
        for q in range(num_groups):
            first = (node_of[q] * groups_per_node + place_of[q]) * group_size
            for i in range(group_size):
                member[first + i] = q * group_size + i
        for node in range(num_nodes):
            first = node * experts_per_node
            for i in range(experts_per_node):
                weight_N[i] = weight_LE[layer, member[first + i]]
            replicate(weight_N, replicas_per_node, expert_P, rank_P, count_N)
            for p in range(replicas_per_node):
                weight_P[p] = weight_N[expert_P[p]] / np.float32(count_N[expert_P[p]])
            pack(weight_P, gpu_room, bin_P, slot_P)
            for p in range(replicas_per_node):
                at = node * replicas_per_node + bin_P[p] * slots + slot_P[p]
                expert_LP[layer, at] = member[first + expert_P[p]]
                rank_LP[layer, at] = rank_P[p]
            for i in range(experts_per_node):
                count_LE[layer, member[first + i]] = count_N[i]


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
    phy2log, rank = np.empty((layers, num_replicas), np.int64), np.empty((layers, num_replicas), np.int64)
    logcnt = np.empty((layers, experts), np.int64)
    rebalance(weights, num_replicas, num_groups, num_nodes, num_gpus, phy2log, rank, logcnt)
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


def _plan_layer(
    x: PlanInput, *, spec: MoESpec, cluster: Cluster, costs: CostModel, budget: Budget, params: EplbParams
) -> LayerPlan:
    room = room_G(budget, spec, cluster.num_gpus)
    total = spec.E + spare_replicas(room, spec.E, budget.max_extra)
    weight_E = x.forecast.mean_E.astype(np.float32)
    expert_P, rank_P = np.empty(total, np.int64), np.empty(total, np.int64)
    count_E = np.empty(spec.E, np.int64)
    replicate(weight_E, total, expert_P, rank_P, count_E)
    bin_P, slot_P = np.empty(total, np.int64), np.empty(total, np.int64)
    weight_P = weight_E[expert_P] / count_E[expert_P].astype(np.float32)
    pack(weight_P, capacities(total, room), bin_P, slot_P)
    return LayerPlan.build(x.layer, expert_P, bin_P, rank_P == 0, num_experts=spec.E, num_gpus=cluster.num_gpus)


def plan_layer(
    x: PlanInput, *, spec: MoESpec, cluster: Cluster, costs: CostModel, budget: Budget, params: EplbParams
) -> LayerPlan:
    """Global balancing: all extras that fit, the first copy of each expert is its primary.

    Raises:
        UserError: the experts do not fit.
    """
    return _plan_layer(x, spec=spec, cluster=cluster, costs=costs, budget=budget, params=params)


def plan_layer_hierarchical(
    x: PlanInput, *, spec: MoESpec, cluster: Cluster, costs: CostModel, budget: Budget, params: EplbParams
) -> LayerPlan:
    """Groups of experts to nodes first, then copies and GPUs inside each node.

    Falls back to the global form where nodes, groups or equal slots do not divide, as DeepSeek's program does.

    Raises:
        UserError: the experts do not fit.
    """
    nodes, gpus = cluster.num_nodes, cluster.num_gpus
    groups = params.num_groups or nodes
    room = room_G(budget, spec, gpus)
    slots = min(int(room.min()), (spec.E + spare_replicas(room, spec.E, budget.max_extra)) // gpus)
    if groups % nodes or gpus % nodes or spec.E % groups or slots * gpus < spec.E:
        return _plan_layer(x, spec=spec, cluster=cluster, costs=costs, budget=budget, params=params)
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
