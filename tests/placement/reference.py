"""Plain NumPy counterparts of the compiled kernels, for tests: slow, short, equal results.

Axes: E experts, P replicas, G bins or GPUs, S source ranks, R replicas of a plan.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import BoolArray, FloatArray, IntArray

Float32Array = NDArray[np.float32]


def replicate(weight_E: Float32Array, num_replicas: int) -> tuple[IntArray, IntArray, IntArray]:
    """EPLB's copies: expert and rank of each replica, copies of each expert."""
    count_E = np.ones(len(weight_E), np.int64)
    expert, rank = list(range(len(weight_E))), [0] * len(weight_E)
    for _ in range(num_replicas - len(weight_E)):
        best = int(np.argmax(weight_E / count_E.astype(np.float32)))
        expert.append(best)
        rank.append(int(count_E[best]))
        count_E[best] += 1
    return np.array(expert), np.array(rank), count_E


def pack(weight_P: Float32Array, capacity_G: IntArray) -> tuple[IntArray, IntArray]:
    """EPLB's bins: bin and position in it of each item."""
    bins, slots = np.zeros(len(weight_P), np.int64), np.zeros(len(weight_P), np.int64)
    if (capacity_G == 1).all() and len(weight_P) == len(capacity_G):
        return np.arange(len(weight_P)), slots
    total, used = np.zeros(len(capacity_G), np.float32), np.zeros(len(capacity_G), np.int64)
    for p in np.argsort(-weight_P, kind="stable"):
        g = int(np.argmin(np.where(used < capacity_G, total, np.inf)))
        bins[p], slots[p] = g, used[g]
        used[g] += 1
        total[g] += weight_P[p]
    return bins, slots


def scale_experts(load_E: FloatArray, max_extra: int, cv_threshold: float, count_idle: bool) -> IntArray:
    """Algorithm 1 of the paper, with the coefficient of variation taken from all replicas each time."""
    count_E = np.ones(len(load_E), np.int64)
    counted = np.ones(len(load_E), np.bool_) if count_idle else load_E > 0
    for _ in range(max_extra if load_E.sum() > 0 else 0):
        replicas = np.repeat(load_E[counted] / count_E[counted], count_E[counted])
        if np.std(replicas) <= cv_threshold * np.mean(replicas):
            break
        count_E[np.argmax(load_E / count_E)] += 1
    return count_E


def place_replicas(load_P: FloatArray, expert_P: IntArray, room: IntArray, alive_EG: IntArray) -> IntArray:
    """Algorithm 2 of the paper."""
    alive = alive_EG.copy()
    total, used = np.zeros(len(room)), np.zeros(len(room), np.int64)
    gpu_P = np.empty(len(load_P), np.int64)
    for p, expert in enumerate(expert_P):
        free = used < room
        warm = free & (alive[expert] > 0)
        g = int(np.argmin(np.where(warm if warm.any() else free, total, np.inf)))
        alive[expert, g] -= int(warm[g])
        gpu_P[p] = g
        used[g] += 1
        total[g] += load_P[p]
    return gpu_P


def even_dispatch(load_SE: IntArray, expert_R: IntArray, serving_R: BoolArray) -> IntArray:
    """Round robin, token by token."""
    quota_SR = np.zeros((len(load_SE), len(expert_R)), np.int64)
    for e in range(load_SE.shape[1]):
        copies = np.flatnonzero((expert_R == e) & serving_R)
        source = np.repeat(np.arange(len(load_SE)), load_SE[:, e])
        np.add.at(quota_SR, (source, copies[np.arange(len(source)) % max(len(copies), 1)]), 1)
    return quota_SR


def fill_sources(load_SE: IntArray, tokens_R: IntArray, expert_R: IntArray, gpu_R: IntArray) -> IntArray:
    """Quotas ``[S, R]`` of given totals: a copy takes tokens of its own GPU first, then source by source."""
    left_SE, left_R = load_SE.copy(), tokens_R.copy()
    quota_SR = np.zeros((len(load_SE), len(expert_R)), np.int64)

    def take(s: int, r: int) -> None:
        n = min(left_SE[s, expert_R[r]], left_R[r])
        quota_SR[s, r] += n
        left_SE[s, expert_R[r]] -= n
        left_R[r] -= n

    for own in np.flatnonzero(gpu_R < len(load_SE)).tolist():
        take(int(gpu_R[own]), own)
    for r in range(len(expert_R)):
        for s in range(len(load_SE)):
            take(s, r)
    return quota_SR


def score_static(
    load_CE: IntArray, gpu_E: IntArray, num_gpus: int, extra: int, a: float, b: float, c: float
) -> tuple[float, FloatArray]:
    """Static EP's mean time over scenarios, and the least that each adds to the mean time of any plan."""
    onto_EG = np.eye(num_gpus)[gpu_E]
    busy_CE = np.where(load_CE > 0, np.maximum(a * load_CE, b), 0.0)
    static_C = (busy_CE @ onto_EG).max(1) + c * (load_CE @ onto_EG).max(1)
    crowded_C = -(-(load_CE > 0).sum(1) // num_gpus) * b
    slowest_C = a * -(-load_CE.max(1) // min(num_gpus, extra + 1))
    expert_C = np.maximum(np.maximum(busy_CE.sum(1) / num_gpus, crowded_C), slowest_C)
    bound_C = expert_C + c * -(-load_CE.sum(1) // num_gpus)
    return float(static_C.mean()), np.asarray(bound_C / len(load_CE))


def grow_by_expert(weight_E: FloatArray, gpu_E: IntArray, room: IntArray, extra: int) -> tuple[IntArray, IntArray]:
    """Extras of the rule that copies the expert with the heaviest copies, onto the coolest GPU that has none of it."""
    holds_EG = np.eye(len(room), dtype=np.bool_)[gpu_E]
    expert: list[int] = []
    gpu: list[int] = []
    closed = np.zeros(len(weight_E), np.bool_)
    while len(expert) < extra and not closed.all():
        share_E = weight_E / holds_EG.sum(1)
        total_G = share_E @ holds_EG
        e = int(np.argmax(np.where(closed, -1.0, share_E)))
        free_G = (holds_EG.sum(0) < room) & ~holds_EG[e]
        closed[e] = not free_G.any()
        if not closed[e]:
            expert.append(e)
            gpu.append(int(np.argmin(np.where(free_G, total_G, np.inf))))
            holds_EG[e, gpu[-1]] = True
    return np.array(expert, np.int64), np.array(gpu, np.int64)
