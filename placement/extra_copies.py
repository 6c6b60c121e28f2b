"""Compiled choice of extra copies: which expert is copied next, onto which GPU.

Axes: E experts, R replicas in order of decision (primaries first), G GPUs.
"""

from __future__ import annotations

import numpy as np

from moeless.jit import njit

#: Which expert is copied next: the hottest on the hottest GPU, the hottest anywhere, or whichever levels most.
BY_GPU, BY_EXPERT, BY_LEVEL = 0, 1, 2


@njit(cache=True, nogil=True)
def _coolest(expert, holds_EG, total_G, room_G):  # type: ignore[no-untyped-def]
    best = -1
    for g in range(len(total_G)):
        if room_G[g] > 0 and not holds_EG[expert, g] and (best < 0 or total_G[g] < total_G[best]):
            best = g
    return best


@njit(cache=True, nogil=True)
def add_extra_copies(weight_E, gpu_E, room_G, max_extra, rule, expert_R, gpu_R):  # type: ignore[no-untyped-def]
    """Fill ``expert_R`` and ``gpu_R`` after the primaries; returns the number of replicas.

    A copy never joins a GPU that already holds its expert. Copies of an expert are taken to share its weight
    evenly, except under ``BY_LEVEL``, where a new copy takes as much as levels the two GPUs. Ties: lowest index.
    """
    num_experts, num_gpus = len(weight_E), len(room_G)
    holds_EG = np.zeros((num_experts, num_gpus), np.bool_)
    # the experts on each GPU, with what each of these copies is taken to serve
    widest = room_G.max()
    member_GX, share_GX = np.empty((num_gpus, widest), np.int64), np.empty((num_gpus, widest))
    used_G = np.zeros(num_gpus, np.int64)
    total_G, copies_E = np.zeros(num_gpus), np.ones(num_experts, np.int64)
    room_G = room_G.copy()
    for e in range(num_experts):
        g = gpu_E[e]
        expert_R[e], gpu_R[e] = e, g
        holds_EG[e, g] = True
        member_GX[g, used_G[g]], share_GX[g, used_G[g]] = e, weight_E[e]
        used_G[g] += 1
        total_G[g] += weight_E[e]
        room_G[g] -= 1
    replicas = num_experts
    share_E = weight_E.copy()
    closed_E, tried_G = np.zeros(num_experts, np.bool_), np.zeros(num_gpus, np.bool_)
    while replicas < num_experts + max_extra:
        best_e, best_h, best_g, best_x = -1, -1, -1, -1
        if rule == BY_EXPERT:
            while best_h < 0:
                best_e, highest = -1, -1.0
                for e in range(num_experts):
                    if share_E[e] > highest and not closed_E[e]:
                        best_e, highest = e, share_E[e]
                if best_e < 0:
                    return replicas
                best_h = _coolest(best_e, holds_EG, total_G, room_G)
                closed_E[best_e] = best_h < 0
        else:
            tried_G[:] = False
            while best_h < 0:
                best_g = -1
                for g in range(num_gpus):
                    if not tried_G[g] and (best_g < 0 or total_G[g] > total_G[best_g]):
                        best_g = g
                if best_g < 0:
                    return replicas
                tried_G[best_g] = True
                share = -1.0
                for x in range(used_G[best_g]):
                    e, mine = member_GX[best_g, x], share_GX[best_g, x]
                    if mine > share or (mine == share and e < best_e):
                        h = _coolest(e, holds_EG, total_G, room_G)
                        if h >= 0:
                            share, best_e, best_h, best_x = mine, e, h, x
        if rule == BY_LEVEL:
            moved = min(share_GX[best_g, best_x], max((total_G[best_g] - total_G[best_h]) / 2, 0.0))
            share_GX[best_g, best_x] -= moved
            total_G[best_g] -= moved
        else:
            moved = weight_E[best_e] / (copies_E[best_e] + 1)
            old = weight_E[best_e] / copies_E[best_e]
            for g in range(num_gpus):
                if holds_EG[best_e, g]:
                    total_G[g] += moved - old
                    for x in range(used_G[g]):
                        if member_GX[g, x] == best_e:
                            share_GX[g, x] = moved
        total_G[best_h] += moved
        member_GX[best_h, used_G[best_h]], share_GX[best_h, used_G[best_h]] = best_e, moved
        used_G[best_h] += 1
        holds_EG[best_e, best_h] = True
        copies_E[best_e] += 1
        share_E[best_e] = weight_E[best_e] / copies_E[best_e]
        room_G[best_h] -= 1
        expert_R[replicas], gpu_R[replicas] = best_e, best_h
        replicas += 1
    return replicas
