"""Compiled Algorithms 1 and 2 of the paper; ``placement/reference.py`` holds them in plain NumPy.

Axes: E experts, P replicas in order of decision, R replicas in a plan's order, G GPUs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeless.contracts import IntArray
from moeless.jit import njit


class PaperTerms(NamedTuple):
    """What both algorithms need beside the forecast.

    Attributes:
        max_extra: copies beyond one of each expert, at most.
        threshold, count_idle, memory_check: as in ``PaperParams``.
        room_G: replicas that each GPU may hold.
    """

    max_extra: int
    threshold: float
    count_idle: bool
    memory_check: bool
    room_G: IntArray


@njit(cache=True, nogil=True)
def scale(load_E, max_extra, threshold, count_idle, count_E):  # type: ignore[no-untyped-def]
    """Algorithm 1 into ``count_E``."""
    total, squares, replicas = 0.0, 0.0, 0
    for e in range(len(load_E)):
        count_E[e] = 1
        total += load_E[e]
        squares += load_E[e] * load_E[e]
        if count_idle or load_E[e] > 0:
            replicas += 1
    if total <= 0.0:
        return
    for _ in range(max_extra):
        # CV^2 = E[x^2] / E[x]^2 - 1 over replicas that carry load_e / count_e each
        if replicas * squares / (total * total) - 1.0 <= threshold * threshold:
            return
        best = 0
        for e in range(1, len(load_E)):
            if load_E[e] / count_E[e] > load_E[best] / count_E[best]:
                best = e
        squares -= load_E[best] * load_E[best] / (count_E[best] * (count_E[best] + 1.0))
        count_E[best] += 1
        replicas += 1


@njit(cache=True, nogil=True)
def place(load_P, expert_P, room, alive_EG, gpu_P):  # type: ignore[no-untyped-def]
    """Algorithm 2 into ``gpu_P``; takes the live copies that it uses out of ``alive_EG``."""
    num_gpus = len(room)
    total, used = np.zeros(num_gpus), np.zeros(num_gpus, np.int64)
    for p in range(len(load_P)):
        e = expert_P[p]
        best = -1
        for g in range(num_gpus):
            if alive_EG[e, g] > 0 and used[g] < room[g] and (best < 0 or total[g] < total[best]):
                best = g
        if best >= 0:
            alive_EG[e, best] -= 1
        else:
            for g in range(num_gpus):
                if used[g] < room[g] and (best < 0 or total[g] < total[best]):
                    best = g
        gpu_P[p] = best
        used[best] += 1
        total[best] += load_P[p]


@njit(cache=True, nogil=True)
def plan_copies(load_E, terms, alive_EG, expert_R, gpu_R, primary_R):  # type: ignore[no-untyped-def]
    """Both algorithms, into arrays that have room; returns the number of replicas, which are in a plan's order.

    An expert's first placed replica is its primary. ``alive_EG`` are live copies before, and is used up.
    """
    experts, num_gpus = len(load_E), len(terms.room_G)
    count_E = np.empty(experts, np.int64)
    scale(load_E, terms.max_extra, terms.threshold, terms.count_idle, count_E)
    replicas = count_E.sum()
    load_P, expert_P = np.empty(replicas), np.empty(replicas, np.int64)
    gpu_P, first_P = np.empty(replicas, np.int64), np.empty(replicas, np.bool_)
    at = 0
    # the heaviest replicas first, ties by expert
    for e in np.argsort(-load_E / count_E, kind="mergesort"):
        for copy in range(count_E[e]):
            load_P[at], expert_P[at], first_P[at] = load_E[e] / count_E[e], e, copy == 0
            at += 1
    room = terms.room_G if terms.memory_check else np.full(num_gpus, replicas)
    place(load_P, expert_P, room, alive_EG, gpu_P)
    at_G = np.zeros(num_gpus + 1, np.int64)
    for p in range(replicas):
        at_G[gpu_P[p] + 1] += 1
    for g in range(num_gpus):
        at_G[g + 1] += at_G[g]
    first_G = at_G.copy()
    for p in range(replicas):
        e, g, primary = expert_P[p], gpu_P[p], first_P[p]
        i = at_G[g]
        at_G[g] += 1
        while i > first_G[g] and (
            (primary and not primary_R[i - 1]) or (primary == primary_R[i - 1] and e < expert_R[i - 1])
        ):
            expert_R[i], gpu_R[i], primary_R[i] = expert_R[i - 1], gpu_R[i - 1], primary_R[i - 1]
            i -= 1
        expert_R[i], gpu_R[i], primary_R[i] = e, g, primary
    return replicas
