"""Compiled parts of EPLB: replicate the hottest expert, pack items of unequal weight into equal bins.

Single precision throughout, as in DeepSeek's published program, so that near-ties fall the same way.
Each kernel has its plain NumPy counterpart in ``reference.py``.

Axes: E experts, P replicas (physical experts), G bins.
"""

from __future__ import annotations

import numpy as np

from moeless.jit import njit


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
