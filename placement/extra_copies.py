"""Compiled choice of extra copies: which expert is copied next, onto which GPU.

Axes: E experts, R replicas in order of decision (primaries first), G GPUs, X copies on a GPU in order of arrival.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from moeless.contracts import BoolArray, FloatArray, Int32Array, IntArray
from moeless.jit import njit

#: Which expert is copied next: the hottest on the hottest GPU, the hottest anywhere, or whichever levels most.
#: NumPy's integers, because numba compiles a function anew for every Python constant that it is called with.
BY_GPU, BY_EXPERT, BY_LEVEL = np.arange(3)
_NONE: Any = np.int64(-1)


class _Holders(NamedTuple):
    """Who holds what so far: each GPU's experts and the weight that each of these copies is taken to serve."""

    holds_EG: BoolArray
    room_G: IntArray
    count_G: IntArray
    weight_G: FloatArray
    expert_GX: IntArray
    share_GX: FloatArray


@njit(cache=True, nogil=True, allocates=False)
def _add(expert: int, gpu: int, share: float, holders: _Holders) -> None:
    x = holders.count_G[gpu]
    holders.expert_GX[gpu, x], holders.share_GX[gpu, x] = expert, share
    holders.holds_EG[expert, gpu] = True
    holders.count_G[gpu] = x + 1
    holders.weight_G[gpu] += share


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _coolest(expert: int, holders: _Holders) -> int:
    """The GPU with the least weight that has room and no copy of the expert; -1 for none."""
    coolest = -1
    for g in range(len(holders.weight_G)):
        free = holders.count_G[g] < holders.room_G[g] and not holders.holds_EG[expert, g]
        if free and (coolest < 0 or holders.weight_G[g] < holders.weight_G[coolest]):
            coolest = g
    return coolest


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _hottest_expert(share_E: FloatArray, full_E: BoolArray, holders: _Holders) -> tuple[int, int]:
    """The expert with the most weight per copy that some GPU can take, and that GPU; -1 for none."""
    while True:
        expert, highest = _NONE, -1.0
        for e in range(len(share_E)):
            if share_E[e] > highest and not full_E[e]:
                expert, highest = e, share_E[e]
        gpu = _coolest(expert, holders) if expert >= 0 else -1
        if expert < 0 or gpu >= 0:
            return expert, gpu
        full_E[expert] = True


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _hottest_copy(tried_G: BoolArray, holders: _Holders) -> tuple[int, int, int]:
    """On the hottest GPU where that is possible: its hottest copy that another GPU can take over in part.

    Returns the copy's GPU, its place there and the other GPU; -1 for none.
    """
    for g in range(len(tried_G)):
        tried_G[g] = False
    while True:
        hottest = -1
        for g in range(len(tried_G)):
            if not tried_G[g] and (hottest < 0 or holders.weight_G[g] > holders.weight_G[hottest]):
                hottest = g
        if hottest < 0:
            return -1, -1, -1
        tried_G[hottest] = True
        place, target = -1, -1
        for x in range(holders.count_G[hottest]):
            expert, share = holders.expert_GX[hottest, x], holders.share_GX[hottest, x]
            if place >= 0:
                best, best_share = holders.expert_GX[hottest, place], holders.share_GX[hottest, place]
                if share < best_share or (share == best_share and expert >= best):
                    continue
            gpu = _coolest(expert, holders)
            if gpu >= 0:
                place, target = x, gpu
        if place >= 0:
            return hottest, place, target


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _share_evenly(expert: int, share: float, before: float, holders: _Holders) -> None:
    """Every copy of the expert serves ``share`` from now on, and no longer ``before``."""
    for g in range(len(holders.weight_G)):
        if holders.holds_EG[expert, g]:
            holders.weight_G[g] += share - before
            for x in range(holders.count_G[g]):
                if holders.expert_GX[g, x] == expert:
                    holders.share_GX[g, x] = share


@njit(cache=True, nogil=True)
def add_extra_copies(
    weight_E: FloatArray,
    gpu_E: IntArray,
    room_G: IntArray,
    max_extra: int,
    rule: np.int64,
    expert_R: Int32Array,
    gpu_R: Int32Array,
) -> int:
    """Fill ``expert_R`` and ``gpu_R`` with primaries and extras; returns the number of replicas.

    A copy never joins a GPU that already holds its expert. Copies of an expert are taken to share its weight
    evenly, except under ``BY_LEVEL``, where a new copy takes as much as levels the two GPUs. Ties: lowest index.

    Args:
        weight_E, gpu_E: weight of each expert, and the GPU of its primary.
        room_G: replicas that each GPU may hold.
        rule: ``BY_GPU``, ``BY_EXPERT`` or ``BY_LEVEL``.
    """
    num_experts, num_gpus, widest = len(weight_E), len(room_G), 0
    for g in range(num_gpus):
        widest = max(widest, room_G[g])
    holders = _Holders(
        np.zeros((num_experts, num_gpus), np.bool_), room_G, np.zeros(num_gpus, np.int64), np.zeros(num_gpus),
        np.empty((num_gpus, widest), np.int64), np.empty((num_gpus, widest)),
    )  # fmt: skip
    copies_E, share_E = np.empty(num_experts, np.int64), np.empty(num_experts)
    full_E, tried_G = np.zeros(num_experts, np.bool_), np.empty(num_gpus, np.bool_)
    for e in range(num_experts):
        expert_R[e], gpu_R[e] = e, gpu_E[e]
        copies_E[e], share_E[e] = 1, weight_E[e]
        _add(e, gpu_E[e], weight_E[e], holders)
    for r in range(num_experts, num_experts + max_extra):
        if rule == BY_EXPERT:
            expert, gpu = _hottest_expert(share_E, full_E, holders)
        else:
            hottest, place, gpu = _hottest_copy(tried_G, holders)
            expert = holders.expert_GX[hottest, place] if gpu >= 0 else -1
        if expert < 0:
            return r
        copies_E[expert] += 1
        if rule == BY_LEVEL:
            excess = max((holders.weight_G[hottest] - holders.weight_G[gpu]) / 2, 0.0)
            share = min(holders.share_GX[hottest, place], excess)
            holders.share_GX[hottest, place] -= share
            holders.weight_G[hottest] -= share
        else:
            share = weight_E[expert] / copies_E[expert]
            _share_evenly(expert, share, share_E[expert], holders)
            share_E[expert] = share
        _add(expert, gpu, share, holders)
        expert_R[r], gpu_R[r] = expert, gpu
    return num_experts + max_extra
