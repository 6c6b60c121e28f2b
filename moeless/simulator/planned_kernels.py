"""Compiled iterations before whose layers plans are made: plan, load copies, wait, run, layer by layer on the clock.

The same steps in the same order as ``AheadPlans`` and ``Stage`` take in Python, for the planners that are compiled: the
paper's and the elastic one.

Axes: L layers, S source ranks, E experts, G GPUs, R replicas in a plan's order (padded), P a previous plan's replicas.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeless.contracts import BoolArray, FloatArray, Int32Array, IntArray
from moeless.jit import njit
from moeless.placement.choose_kernels import NOTES, ChoiceTerms, choose_noting, sort_plan, still_chosen
from moeless.placement.paper import PaperTerms, plan_copies
from moeless.predictors.distance import NEWEST
from moeless.serverless.kernels import expire, provision
from moeless.simulator.fixed_plan_kernels import FixedTerms, fix_layer
from moeless.simulator.kernels import imbalance, tally_layer
from moeless.simulator.layer_kernels import LOAD, load_tokens, memory, time_layer
from moeless.simulator.plan_rows import shares_of

#: Whose plans: Algorithms 1 and 2, the elastic planner's, or those of elastic with shares fixed ahead.
PAPER, ELASTIC, AHEAD = 0, 1, 2


class PlannerTerms(NamedTuple):
    """A compiled planner; of its last fields those of its kind are read.

    Attributes:
        kind: PAPER, ELASTIC or AHEAD.
        distance: layers ahead that a plan is asked for.
        delay: seconds from then until it is there, for layers that another precedes by the distance.
        copy_G: seconds in which an expert is taken to come to each GPU.
        skip_L: as the elastic planner's ``skip``.
    """

    kind: int
    distance: int
    delay: float
    copy_G: FloatArray
    skip_L: FloatArray
    paper: PaperTerms
    elastic: ChoiceTerms
    fixed: FixedTerms


class Guesses(NamedTuple):
    """Plans made as an iteration starts, for layers whose turn comes later; see :func:`guess_layers`.

    Attributes:
        made_L: whether there is one, in the layer's row of the plans that are coming.
        expert_LP, gpu_LP, primary_LP, count_L: the copies in memory or in force that it was made from.
        noted_LN, expert_LX, gpu_LX: what hangs on the moment.
    """

    made_L: BoolArray
    expert_LP: Int32Array
    gpu_LP: Int32Array
    primary_LP: BoolArray
    count_L: IntArray
    noted_LN: FloatArray
    expert_LX: Int32Array
    gpu_LX: Int32Array


def guesses(layers: int, widest: int) -> Guesses:
    """Room for a guess of each layer whose copies are at most ``widest``, lingering ones included."""
    shape = (layers, widest)
    return Guesses(
        np.zeros(layers, np.bool_),
        np.empty(shape, np.int32),
        np.empty(shape, np.int32),
        np.empty(shape, np.bool_),
        np.empty(layers, np.int64),
        np.empty((layers, NOTES)),
        np.empty(shape, np.int32),
        np.empty(shape, np.int32),
    )


@njit(cache=True, nogil=True)
def _live(layer, experts, num_gpus, plans, pool):  # type: ignore[no-untyped-def]
    """Copies of the plan in force that are in memory or on their way, and those that linger beside it, ``[E, G]``."""
    alive_EG = np.zeros((experts, num_gpus), np.int64)
    for r in range(plans.count_L[layer]):
        e, g = plans.expert_LR[layer, r], plans.gpu_LR[layer, r]
        if pool.ready_LEG[layer, e, g] != np.inf:
            alive_EG[e, g] += 1
    for e in range(experts):
        for g in range(num_gpus):
            if pool.born_LEG[layer, e, g] != np.inf and not pool.planned_LEG[layer, e, g]:
                alive_EG[e, g] += 1
    return alive_EG


@njit(cache=True, nogil=True)
def _previous(layer, experts, num_gpus, plans, pool):  # type: ignore[no-untyped-def]
    """The plan in force with lingering copies as further extras, in a plan's order, and which of them are live."""
    size = plans.count_L[layer]
    for e in range(experts):
        for g in range(num_gpus):
            if pool.born_LEG[layer, e, g] != np.inf and not pool.planned_LEG[layer, e, g]:
                size += 1
    expert_P, gpu_P = np.empty(size, np.int32), np.empty(size, np.int32)
    primary_P, live_P = np.zeros(size, np.bool_), np.ones(size, np.bool_)
    at, r, count = 0, 0, plans.count_L[layer]
    for g in range(num_gpus):
        begin = at
        while r < count and plans.gpu_LR[layer, r] == g:
            e = plans.expert_LR[layer, r]
            expert_P[at], gpu_P[at], primary_P[at] = e, g, plans.primary_LR[layer, r]
            live_P[at] = pool.ready_LEG[layer, e, g] != np.inf
            r += 1
            at += 1
        if size == count:
            continue
        for e in range(experts):
            if pool.born_LEG[layer, e, g] != np.inf and not pool.planned_LEG[layer, e, g]:
                i = at
                at += 1
                while i > begin and not primary_P[i - 1] and expert_P[i - 1] > e:
                    expert_P[i], gpu_P[i], live_P[i] = expert_P[i - 1], g, live_P[i - 1]
                    i -= 1
                expert_P[i], gpu_P[i], live_P[i] = e, g, pool.ready_LEG[layer, e, g] != np.inf
    return expert_P, gpu_P, primary_P, live_P


@njit(cache=True, nogil=True)
def _lead(layer, pace, planner):  # type: ignore[no-untyped-def]
    """Seconds between a layer's planning and its start, as far as the pace is known."""
    if not pace >= 0.0:
        return 0.0
    # the first layers are planned from what is known since the last iteration: nothing has to be waited for
    return layer * pace if layer < planner.distance else max(planner.distance * pace - planner.delay, 0.0)


@njit(cache=True, nogil=True)
def _choose(  # type: ignore[no-untyped-def]
    layer, mean_E, var_E, doubt, expert_P, gpu_P, primary_P, live_P, horizon, lead, planner, coming, noted_N, expert_X,
    gpu_X,
):  # fmt: skip
    expert_R, gpu_R, primary_R = coming.expert_LR[layer], coming.gpu_LR[layer], coming.primary_LR[layer]
    count = choose_noting(
        mean_E, var_E, doubt, expert_P, gpu_P, primary_P, live_P, horizon, lead, planner.copy_G, planner.skip_L[layer],
        planner.elastic, expert_R, gpu_R, noted_N, expert_X, gpu_X,
    )  # fmt: skip
    sort_plan(count, planner.elastic, expert_R, gpu_R, primary_R)
    coming.count_L[layer] = count


@njit(cache=True, nogil=True)
def guess_layers(  # type: ignore[no-untyped-def]
    start, stop, layer_N, mean_LE, var_LE, doubt, horizon_L, pace, planner, plans, coming, pool, made
):
    """Plan some layers at once, from the copies that are there as the iteration starts.

    When a layer's turn comes, the plan holds if its copies are still the same and a change that was weighed against its
    delay would be judged as it was; otherwise it is planned anew. Elastic planners alone; shares are fixed later.
    """
    experts, num_gpus, widest = mean_LE.shape[1], pool.ready_LEG.shape[2], made.expert_LP.shape[1]
    for n in range(start, stop):
        layer = layer_N[n]
        expert_P, gpu_P, primary_P, live_P = _previous(layer, experts, num_gpus, plans, pool)
        count = len(expert_P)
        made.made_L[layer] = count <= widest
        if count > widest:
            continue
        made.count_L[layer] = count
        made.expert_LP[layer, :count], made.gpu_LP[layer, :count] = expert_P, gpu_P
        made.primary_LP[layer, :count] = primary_P
        _choose(
            layer, mean_LE[layer], var_LE[layer], doubt, expert_P, gpu_P, primary_P, live_P, horizon_L[layer],
            _lead(layer, pace, planner), planner, coming, made.noted_LN[layer], made.expert_LX[layer],
            made.gpu_LX[layer],
        )  # fmt: skip


@njit(cache=True, nogil=True)
def _holds(layer, expert_P, gpu_P, primary_P, live_P, lead, planner, made):  # type: ignore[no-untyped-def]
    """Whether the layer's plan was guessed, and would be made just so."""
    count = len(expert_P)
    if not made.made_L[layer] or made.count_L[layer] != count:
        return False
    for p in range(count):
        if (
            made.expert_LP[layer, p] != expert_P[p]
            or made.gpu_LP[layer, p] != gpu_P[p]
            or made.primary_LP[layer, p] != primary_P[p]
        ):
            return False
    return still_chosen(
        made.noted_LN[layer], made.expert_LX[layer], made.gpu_LX[layer], expert_P, gpu_P, primary_P, live_P, lead,
        planner.copy_G,
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _decide(  # type: ignore[no-untyped-def]
    layer, mean_E, var_E, doubt, spread, horizon, pace, now, planner, plans, coming, pool, keep, made
):
    """Plan a layer, into its row of ``coming``."""
    experts, num_gpus = len(mean_E), pool.ready_LEG.shape[2]
    expire(
        layer, now, pool.num_bytes, pool.keep_LE, pool.ready_LEG, pool.born_LEG, pool.used_LEG, pool.planned_LEG,
        pool.resident_G, pool.counters,
    )  # fmt: skip
    expert_R, gpu_R = coming.expert_LR[layer], coming.gpu_LR[layer]
    if planner.kind == PAPER:
        coming.count_L[layer] = plan_copies(
            mean_E, planner.paper, _live(layer, experts, num_gpus, plans, pool), expert_R, gpu_R,
            coming.primary_LR[layer],
        )  # fmt: skip
    else:
        expert_P, gpu_P, primary_P, live_P = _previous(layer, experts, num_gpus, plans, pool)
        lead = _lead(layer, pace, planner)
        if not _holds(layer, expert_P, gpu_P, primary_P, live_P, lead, planner, made):
            _choose(
                layer, mean_E, var_E, doubt, expert_P, gpu_P, primary_P, live_P, horizon, lead, planner, coming,
                np.empty(NOTES), expert_R[:0], gpu_R[:0],
            )  # fmt: skip
        if planner.kind == AHEAD:
            fix_layer(
                layer, mean_E, var_E, spread, expert_P, gpu_P, live_P, horizon, lead, planner.copy_G, planner.fixed,
                planner.elastic, plans, pool.ready_LEG[layer], coming,
            )  # fmt: skip
    count = coming.count_L[layer]
    if keep.active:
        keep.planned_LE[layer] = mean_E
        plain = count == experts
        for r in range(count):
            plain = plain and keep.gpu_E[expert_R[r]] == gpu_R[r]
        keep.plain_L[layer] = plain


@njit(cache=True, nogil=True)
def _adopt(layer, since, plans, coming, pool):  # type: ignore[no-untyped-def]
    """Put a layer's new plan in force, its copies loading from ``since`` on."""
    count = coming.count_L[layer]
    provision(
        layer, coming.expert_LR[layer, :count], coming.gpu_LR[layer, :count], since, pool.num_bytes,
        pool.fixed_keep_alive, pool.adaptive, pool.keep_LE, pool.histogram_LEB, pool.island_size, pool.tier_seconds,
        pool.start_seconds, pool.instant, pool.ready_LEG, pool.born_LEG, pool.used_LEG, pool.planned_LEG,
        pool.engine_free_G, pool.resident_G, pool.capacity_G, pool.counters,
    )  # fmt: skip
    plans.count_L[layer] = count
    for r in range(count):
        plans.expert_LR[layer, r], plans.gpu_LR[layer, r] = coming.expert_LR[layer, r], coming.gpu_LR[layer, r]
        plans.primary_LR[layer, r] = coming.primary_LR[layer, r]
    plans.fixed_L[layer] = coming.fixed_L[layer]
    if coming.fixed_L[layer]:
        plans.share_LR[layer, :count] = coming.share_LR[layer, :count]


@njit(cache=True, nogil=True)
def _wait(layer, load_E, clock, expert_R, gpu_R, primary_R, pool, first_E, alive_E, serving_R):  # type: ignore[no-untyped-def]
    """Fill ``serving_R``; returns how many copies are warm at once, and how long until those needed are."""
    experts, replicas, warm = len(first_E), len(expert_R), 0
    for r in range(replicas):
        serving_R[r] = pool.ready_LEG[layer, expert_R[r], gpu_R[r]] <= clock
        warm += serving_R[r]
    if warm == replicas:
        return warm, 0.0
    for e in range(experts):
        first_E[e], alive_E[e] = np.inf, 0
    for r in range(replicas):
        first_E[expert_R[r]] = min(first_E[expert_R[r]], pool.ready_LEG[layer, expert_R[r], gpu_R[r]])
    until = clock
    for e in range(experts):
        if load_E[e] > 0:
            until = max(until, first_E[e])
    stall = until - clock
    for r in range(replicas):
        serving_R[r] = pool.ready_LEG[layer, expert_R[r], gpu_R[r]] <= clock + stall
        alive_E[expert_R[r]] += serving_R[r]
    for r in range(replicas):
        if primary_R[r] and alive_E[expert_R[r]] == 0:
            serving_R[r] = 1
    return warm, stall


@njit(cache=True, nogil=True)
def planned_iteration(  # type: ignore[no-untyped-def]
    topk_TLK, row_T, rank_T, load_LE, mean_LE, var_LE, horizon_L, doubt, spread, kept_L, pace_1, clock, per_layer,
    planner, plans, coming, made, pool, keep, mode, rates, terms, misc, control_L, settled_at, stall_2, stalled_2,
    tally, time_L,
):  # fmt: skip
    """One iteration that plans all layers but those kept; returns the clock, plans that came late, and a layer.

    Args:
        topk_TLK, row_T, rank_T: the tokens' experts, as in ``layer_kernels.load_tokens``; ``load_LE`` gets their loads.
        mean_LE, var_LE: each layer's forecast, where it is not kept.
        doubt, spread: relative spread of a forecast, at least: for choosing copies, and for fixing shares.
        horizon_L: iterations that a change's gain is weighed over.
        pace_1: seconds that a layer of this phase takes with all around it, NaN where none has been planned for yet;
            goes on by this iteration's layers where any of them is planned.
        coming: room for plans on their way.
        mode, rates: as in ``layer_kernels.time_layer``.
        settled_at: until when a wait has a cause of its own: added to ``stall_2[0]``, later ones to ``stall_2[1]``.
        stalled_2: set where anything was added, be it nothing.
        made: plans made ahead, in ``coming``; used up.

    The layer is -1, or one that tokens need and whose copies nothing loads: the run has failed.
    """
    layers, experts = load_LE.shape
    num_gpus = pool.ready_LEG.shape[2]
    all_replicas = plans.count_L.sum()
    since_L, waiting_L = np.zeros(layers), np.zeros(layers, np.bool_)
    widest = plans.expert_LR.shape[1]
    tokens = len(row_T) * topk_TLK.shape[2]
    m = memory(num_gpus, experts, widest, num_gpus, terms.island_size, tokens)
    first_E, alive_E, serving_R = np.empty(experts), np.empty(experts, np.int64), np.empty(widest, np.int64)
    late, planned = 0, not kept_L.all()
    for layer in range(min(planner.distance, layers)):
        if not kept_L[layer]:
            _decide(
                layer, mean_LE[layer], var_LE[layer], doubt, spread, horizon_L[layer], pace_1[0], clock, planner, plans,
                coming, pool, keep, made,
            )  # fmt: skip
            since_L[layer], waiting_L[layer] = clock + 0.0, True
    for layer in range(layers):
        clock += per_layer
        target = layer + planner.distance
        if target < layers and not kept_L[target]:
            _decide(
                target, mean_LE[target], var_LE[target], doubt, spread, horizon_L[target], pace_1[0], clock, planner,
                plans, coming, pool, keep, made,
            )  # fmt: skip
            since_L[target], waiting_L[target] = clock + planner.delay, True
        if waiting_L[layer] and since_L[layer] <= clock:
            _adopt(layer, since_L[layer], plans, coming, pool)
            waiting_L[layer] = False
        n = plans.count_L[layer]
        expert_R, gpu_R = plans.expert_LR[layer, :n], plans.gpu_LR[layer, :n]
        primary_R = plans.primary_LR[layer, :n]
        load_tokens(topk_TLK, row_T, rank_T, layer, m)
        load_LE[layer] = m.expert_XE[0, :experts]
        warm, stall = _wait(layer, load_LE[layer], clock, expert_R, gpu_R, primary_R, pool, first_E, alive_E, serving_R)
        if warm < n:
            if stall == np.inf:
                return clock, late, layer
            kind = 0 if clock < settled_at else 1
            stall_2[kind] += stall
            stalled_2[kind] = True
        expert, exchange, active = time_layer(
            expert_R, gpu_R, primary_R, serving_R[:n], shares_of(layer, plans), mode, rates, terms, num_gpus, m
        )
        control = control_L[layer] if n > experts and not plans.fixed_L[layer] else 0.0
        time_L[layer] = tally_layer(
            tally, expert, exchange, misc, control, stall, imbalance(m.sums_XG[LOAD]), n, all_replicas, active, warm
        )
        clock += time_L[layer]
        if planned:
            seconds = per_layer + time_L[layer]
            known = pace_1[0] if pace_1[0] >= 0.0 else seconds
            pace_1[0] = known + NEWEST * (seconds - known)
        if waiting_L[layer]:
            late += 1
            _adopt(layer, since_L[layer], plans, coming, pool)
            waiting_L[layer] = False
    made.made_L[:] = False
    return clock, late, -1
