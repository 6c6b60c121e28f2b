"""The compiled walk over an iteration's layers on the clock: plans arrive, copies load, layers wait and run.

The walk knows no planner: plans are made before it, and it says when each is there. Dispatch is a compiled rule; where
the rule is in Python, the walk stops at each layer that has to ask it and goes on with the quotas that it gave.

Axes: L layers, E experts, T tokens in order of their ranks, R replicas in a plan's order (padded), N plans on their
way, X columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import BoolArray, FloatArray, IntArray
from moeless.costs.layer_time import LOAD, LayerCosts, quota_seconds, total_seconds
from moeless.jit import njit
from moeless.placement.dealing import take_tokens
from moeless.placement.plan_rows import PlanRows
from moeless.serverless.kernels import PoolState, provision
from moeless.simulator.layer_timing import fill_parts, memory, single_layers, time_dealt
from moeless.simulator.tally import STALL_PART, START_PART, WARM_PART, layer_time

#: Columns of the walk's state: the clock, the waiting and the warm copies of the layer that is being started, plans
#: that came after their layer had started, and a layer that cannot run (-1: none).
CLOCK, WAITED, WARM, LATE, FAILED = 0, 1, 2, 3, 4
NUM_STATE = 5
#: In ``Walk.asked_L``: a plan is asked for before the iteration's first layer.
BEFORE = -1


class Walk(NamedTuple):
    """One iteration on the clock.

    Attributes:
        topk_TLK, row_T, rank_T: the tokens' experts, rows and source ranks, the ranks ascending.
        plans: the plans in force, a layer in each row.
        coming: plans on their way; ``row_L`` says where a layer's is, -1 where there is none.
        asked_L: the layer at whose start a layer's coming plan was asked for, or ``BEFORE``.
        since_L: when a coming plan is there.
        gpu_LE: as ``layer_timing.survey`` fills it.
        control_L: seconds of each layer's decisions after the gate.
        timed_L: layers whose run under the plans in force stands in ``part_LX`` and ``load_LE`` already.
        part_LX: each layer's run, columns of ``tally``.
        load_LG: tokens of each GPU; of no rows where nobody asks.
        stall_2, stalled_2: waiting up to ``settled_at``, and after it: seconds, and whether there was any.
        per_layer: seconds outside the experts ahead of each MoE layer.
        delay: seconds from asking for a plan until it is there, for those not asked before the iteration.
    """

    topk_TLK: NDArray[np.uint16]
    row_T: IntArray
    rank_T: IntArray
    plans: PlanRows
    coming: PlanRows
    row_L: IntArray
    asked_L: IntArray
    since_L: FloatArray
    pool: PoolState
    gpu_LE: IntArray
    control_L: FloatArray
    costs: LayerCosts
    timed_L: BoolArray
    part_LX: FloatArray
    load_LE: IntArray
    load_LG: FloatArray
    state_X: FloatArray
    stall_2: FloatArray
    stalled_2: BoolArray
    settled_at: float
    per_layer: float
    delay: float


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _adopt(layer, w):  # type: ignore[no-untyped-def]
    """Put a layer's coming plan in force, its copies loading since it was there."""
    row, plans, coming, gpu_LE = w.row_L[layer], w.plans, w.coming, w.gpu_LE
    count = coming.count_N[row]
    provision(layer, coming.expert_NR[row, :count], coming.gpu_NR[row, :count], w.since_L[layer], w.pool)
    from_expert_R, from_gpu_R, from_primary_R = coming.expert_NR[row], coming.gpu_NR[row], coming.primary_NR[row]
    to_expert_R, to_gpu_R, to_primary_R = plans.expert_NR[layer], plans.gpu_NR[layer], plans.primary_NR[layer]
    from_share_R, to_share_R, fixed = coming.share_NR[row], plans.share_NR[layer], coming.fixed_N[row]
    for r in range(count):
        to_expert_R[r], to_gpu_R[r], to_primary_R[r] = from_expert_R[r], from_gpu_R[r], from_primary_R[r]
        gpu_LE[layer, from_expert_R[r]] = from_gpu_R[r]
        if fixed:
            to_share_R[r] = from_share_R[r]
    plans.count_N[layer], plans.fixed_N[layer] = count, fixed
    w.row_L[layer], w.timed_L[layer] = -1, False


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _count_warm(layer, w):  # type: ignore[no-untyped-def]
    """How many of the copies of the plan in force are warm."""
    expert_R, gpu_R, ready_LEG = w.plans.expert_NR[layer], w.plans.gpu_NR[layer], w.pool.ready_LEG
    clock, warm = w.state_X[CLOCK], 0
    for r in range(w.plans.count_N[layer]):
        warm += ready_LEG[layer, expert_R[r], gpu_R[r]] <= clock
    return warm


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _wait(layer, tokens_E, w, m):  # type: ignore[no-untyped-def]
    """Fill ``m.serving_R``; returns how long until every expert with tokens has a copy."""
    count, experts, clock = w.plans.count_N[layer], len(tokens_E), w.state_X[CLOCK]
    expert_R, gpu_R, primary_R = w.plans.expert_NR[layer], w.plans.gpu_NR[layer], w.plans.primary_NR[layer]
    ready_LEG = w.pool.ready_LEG
    serving_R, first_E, alive_E = m.serving_R, m.ready_E, m.home_E
    for e in range(experts):
        first_E[e], alive_E[e] = np.inf, 0
    for r in range(count):
        first_E[expert_R[r]] = min(first_E[expert_R[r]], ready_LEG[layer, expert_R[r], gpu_R[r]])
    until = clock
    for e in range(experts):
        if tokens_E[e] > 0:
            until = max(until, first_E[e])
    stall = until - clock
    for r in range(count):
        serving_R[r] = ready_LEG[layer, expert_R[r], gpu_R[r]] <= clock + stall
        alive_E[expert_R[r]] += serving_R[r]
    for r in range(count):
        if primary_R[r] and alive_E[expert_R[r]] == 0:
            serving_R[r] = True
    return stall


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _end_layer(layer, w):  # type: ignore[no-untyped-def]
    """Move the clock past a layer that has run; a plan that came too late for it is in force from now on."""
    state_X, part_X = w.state_X, w.part_LX[layer]
    part_X[STALL_PART], part_X[WARM_PART], part_X[START_PART] = state_X[WAITED], state_X[WARM], state_X[CLOCK]
    state_X[CLOCK] += total_seconds(layer_time(part_X, w.costs))
    if w.row_L[layer] >= 0:
        state_X[LATE] += 1
        _adopt(layer, w)


@njit(cache=True, nogil=True, allocates=False)
def walk_layers(first, w, rule, numbers, in_python, m):  # type: ignore[no-untyped-def]
    """Run the layers from ``first`` on; returns how many layers have run.

    Where it is fewer than there are, either that layer has failed (``FAILED`` holds it: tokens need an expert whose
    copies nothing loads), or the rule is ``in_python`` and has to deal that layer's tokens (:func:`run_dealt`).
    """
    layers, experts = w.load_LE.shape
    state_X, row_L, asked_L, since_L = w.state_X, w.row_L, w.asked_L, w.since_L
    count_L, fixed_L, timed_L = w.plans.count_N, w.plans.fixed_N, w.timed_L
    for layer in range(first, layers):
        state_X[CLOCK] += w.per_layer
        for target in range(layer + 1, layers):
            if row_L[target] >= 0 and asked_L[target] == layer:
                since_L[target] = state_X[CLOCK] + w.delay
        if row_L[layer] >= 0 and since_L[layer] <= state_X[CLOCK]:
            _adopt(layer, w)
        count = count_L[layer]
        warm, decides = _count_warm(layer, w), count > experts and not fixed_L[layer]
        state_X[WAITED], state_X[WARM] = 0.0, warm
        if warm == count and timed_L[layer]:
            _end_layer(layer, w)
            continue
        if warm == count and count == experts and len(w.load_LG) == 0:
            single_layers(layer, layer + 1, w.topk_TLK, w.row_T, w.rank_T, w.gpu_LE, w.costs, m, w.part_LX, w.load_LE)
            _end_layer(layer, w)
            continue
        take_tokens(w.topk_TLK, w.row_T, w.rank_T, layer, m.table_SE, m.load)
        load_E, tokens_E = w.load_LE[layer], m.load.tokens_E
        for e in range(experts):
            load_E[e] = tokens_E[e]
        if warm == count:
            for r in range(count):
                m.serving_R[r] = True
        else:
            stall = _wait(layer, tokens_E, w, m)
            if stall == np.inf:
                state_X[FAILED] = layer
                return layer
            kind = 0 if state_X[CLOCK] < w.settled_at else 1
            w.stall_2[kind] += stall
            w.stalled_2[kind] = True
            state_X[WAITED] = stall
        if in_python and decides:
            return layer
        time_dealt(layer, w.plans, rule, numbers, w.control_L[layer], w.costs, m, w.part_LX[layer])
        if len(w.load_LG) > 0:
            _note_load(layer, m.traffic.traffic_QG, w)
        _end_layer(layer, w)
    return layers


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _note_load(layer, traffic_QG, w):  # type: ignore[no-untyped-def]
    for g in range(traffic_QG.shape[1]):
        w.load_LG[layer, g] = traffic_QG[LOAD, g]


@njit(cache=True, nogil=True)
def run_dealt(layer, quota_SR, w, m):  # type: ignore[no-untyped-def]
    """Run the layer at which :func:`walk_layers` stopped, by quotas."""
    traffic_QG, count = m.traffic.traffic_QG, w.plans.count_N[layer]
    expert, exchange, active = quota_seconds(quota_SR, w.plans.gpu_NR[layer, :count], w.costs, traffic_QG)
    fill_parts(expert, exchange, w.control_L[layer], active, count, traffic_QG, w.part_LX[layer])
    if len(w.load_LG) > 0:
        _note_load(layer, traffic_QG, w)
    _end_layer(layer, w)


@njit(cache=True, nogil=True)
def walk(w, rule, numbers):  # type: ignore[no-untyped-def]
    """Run all layers under a compiled rule; returns how many have run, fewer than there are where one has failed."""
    gpus, experts, widest = len(w.costs.island_G), w.load_LE.shape[1], w.plans.expert_NR.shape[1]
    m = memory(gpus, experts, widest, gpus, len(w.row_T) * w.topk_TLK.shape[2])
    return walk_layers(0, w, rule, numbers, False, m)
