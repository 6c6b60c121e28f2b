"""Compiled plans with shares fixed ahead: what ``elastic_ahead`` makes of the elastic planner's plan of a layer.

Axes: L layers, C scenarios, E experts, R replicas, P a previous plan's replicas.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeless.contracts import FloatArray
from moeless.jit import njit
from moeless.placement.fixed_kernels import weigh_fixed


class FixedTerms(NamedTuple):
    """What weighing fixed shares needs beside the elastic planner's terms; see ``ElasticAheadParams``.

    Attributes:
        normal_CE: standard normal deviates of the scenarios.
        control_L: seconds that dispatch after the gate takes in each layer.
    """

    normal_CE: FloatArray
    control_L: FloatArray
    caution: float
    margin: float


def no_fixed(layers: int, experts: int) -> FixedTerms:
    """For planners that fix no shares."""
    return FixedTerms(np.zeros((0, experts)), np.zeros(layers), 0.0, 0.0)


@njit(cache=True, nogil=True)
def _before(r, q, expert_R, primary_R):  # type: ignore[no-untyped-def]
    """Whether replica r goes before q where primaries are first, then experts ascend."""
    if primary_R[r] != primary_R[q]:
        return primary_R[r]
    return expert_R[r] < expert_R[q]


@njit(cache=True, nogil=True)
def _primaries_first(expert_R, primary_R):  # type: ignore[no-untyped-def]
    """Order of replicas: primaries first, experts ascending, ties as they are."""
    order_R = np.arange(len(expert_R))
    for i in range(1, len(order_R)):
        r, at = order_R[i], i
        while at > 0 and _before(r, order_R[at - 1], expert_R, primary_R):
            order_R[at] = order_R[at - 1]
            at -= 1
        order_R[at] = r
    return order_R


@njit(cache=True, nogil=True)
def _into_order(count, experts, expert_R, gpu_R, share_R, layer, coming):  # type: ignore[no-untyped-def]
    """Copies, primaries first, into the layer's row in a plan's order: GPU, primary first, expert."""
    for i in range(count):
        at = i
        while at > 0:
            g, e = coming.gpu_LR[layer, at - 1], coming.expert_LR[layer, at - 1]
            primary = coming.primary_LR[layer, at - 1]
            mine = i < experts
            if g < gpu_R[i] or (g == gpu_R[i] and (primary > mine or (primary == mine and e <= expert_R[i]))):
                break
            coming.gpu_LR[layer, at], coming.expert_LR[layer, at] = g, e
            coming.primary_LR[layer, at], coming.share_LR[layer, at] = primary, coming.share_LR[layer, at - 1]
            at -= 1
        coming.gpu_LR[layer, at], coming.expert_LR[layer, at] = gpu_R[i], expert_R[i]
        coming.primary_LR[layer, at], coming.share_LR[layer, at] = i < experts, share_R[i]


@njit(cache=True, nogil=True)
def fix_layer(  # type: ignore[no-untyped-def]
    layer,
    mean_E,
    var_E,
    spread,
    expert_P,
    gpu_P,
    live_P,
    horizon,
    lead,
    copy_G,
    terms,
    elastic,
    plans,
    ready_EG,
    coming,
):
    """Replace a layer's elastic plan in ``coming`` by one with fixed shares where that is expected to be faster.

    Args:
        spread: relative spread that the forecast has at least.
        expert_P, gpu_P, live_P: copies in memory or in force, for a plan in force without shares.
        lead, copy_G: as in ``choose_kernels.choose``.
        terms, elastic: of the two planners.
        ready_EG: when the layer's copies are warm.
    """
    experts, count = len(mean_E), coming.count_L[layer]
    coming.fixed_L[layer] = False
    if elastic.extra == 0 or len(elastic.room_G) == 1 or terms.control_L[layer] <= 0.0 or len(terms.normal_CE) == 0:
        return
    order_R = _primaries_first(coming.expert_LR[layer, :count], coming.primary_LR[layer, :count])
    base_expert_R, base_gpu_R = coming.expert_LR[layer, :count][order_R], coming.gpu_LR[layer, :count][order_R]
    share_P = np.empty(0)
    if plans.fixed_L[layer]:
        n = plans.count_L[layer]
        # copies that linger in memory beside the plan have no share
        used = np.flatnonzero(plans.primary_LR[layer, :n] | (plans.share_LR[layer, :n] > 0))
        order = used[_primaries_first(plans.expert_LR[layer, :n][used], plans.primary_LR[layer, :n][used])]
        expert_P, gpu_P = plans.expert_LR[layer, :n][order], plans.gpu_LR[layer, :n][order]
        share_P, live_P = plans.share_LR[layer, :n][order], np.empty(len(order), np.bool_)
        for p in range(len(order)):
            live_P[p] = ready_EG[expert_P[p], gpu_P[p]] != np.inf
    size = experts + elastic.extra
    expert_R, gpu_R, share_R = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size)
    count = weigh_fixed(
        mean_E, var_E, spread, terms.normal_CE, elastic, base_expert_R, base_gpu_R, expert_P, gpu_P, live_P, share_P,
        horizon, lead, copy_G, terms.control_L[layer], terms.caution, terms.margin, expert_R, gpu_R, share_R,
    )  # fmt: skip
    if count > 0:
        _into_order(count, experts, expert_R, gpu_R, share_R, layer, coming)
        coming.count_L[layer], coming.fixed_L[layer] = count, True
