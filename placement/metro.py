"""METRO: balance activated experts, not tokens, where weight reads decide (decode).

Source: Yu et al., "Efficient MoE Serving in the Memory-Bound Regime: Balance Activated Experts, Not Tokens",
arXiv 2512.09277 (vLLM on 8 A100), known from its abstract and from what others write of it, not from its text: the
placement stays EPLB's; what differs is the routing after the gate, for which all ranks gather all top-k choices: it
minimises the experts that a GPU activates and is close to optimal. Its algorithm is not known to us. Our greedy
reading: each expert with tokens uses one copy only; experts with the fewest copies choose first, each the GPU with the
fewest activated experts, then with the fewest tokens, then the lowest.

Axes: E experts, R replicas, G GPUs, N runs of tokens, X rows of what is dealt.
"""

from __future__ import annotations

import numpy as np

from moeless.jit import njit
from moeless.placement.base import Planner
from moeless.placement.dispatch import DispatchRule
from moeless.placement.eplb import EplbParams, plan_layer


@njit(cache=True, nogil=True)
def deal(load, copies, numbers, costs, dealt):  # type: ignore[no-untyped-def]
    """One copy of each expert with tokens, activated experts balanced over GPUs; returns the number of rows."""
    total_E, first_E, last_E, source_N, tokens_N = load
    source_X, copy_X, tokens_X = dealt
    copy_E, by_expert_R, gpu_R = copies.first_E, copies.by_expert_R, copies.gpu_R
    experts = len(total_E)
    active_G, tokens_G = np.zeros(copies.num_gpus, np.int64), np.zeros(copies.num_gpus, np.int64)
    most, key_E = 0, np.empty(experts, np.int64)
    for e in range(experts):
        most = max(most, total_E[e])
    # fewest copies first, most tokens first among those
    for e in range(experts):
        key_E[e] = (copy_E[e + 1] - copy_E[e]) * (most + 1) - total_E[e]
    x = 0
    for e in np.argsort(key_E, kind="mergesort"):
        if total_E[e] == 0:
            continue
        best = -1
        for j in range(copy_E[e], copy_E[e + 1]):
            r = by_expert_R[j]
            g, h = gpu_R[r], gpu_R[best]
            if best < 0 or active_G[g] < active_G[h] or (active_G[g] == active_G[h] and tokens_G[g] < tokens_G[h]):
                best = r
        active_G[gpu_R[best]] += 1
        tokens_G[gpu_R[best]] += total_E[e]
        for n in range(first_E[e], last_E[e]):
            source_X[x], copy_X[x], tokens_X[x] = source_N[n], best, tokens_N[n]
            x += 1
    return x


PLANNER = Planner(
    name="metro",
    plan_layer=plan_layer,
    dispatch=DispatchRule(gathers_counts=True, deal=deal),
    params=EplbParams,
    cadence="interval",
    needs_forecast=True,
    default_predictor="history",
    source="METRO, arXiv 2512.09277; placement by EPLB",
)
