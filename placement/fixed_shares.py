"""Compiled search for extras whose shares are fixed ahead.

Axes: C scenarios, E experts, G GPUs, X copies (primaries of ascending experts first), R replicas, N layers of a batch,
P a previous plan's replicas.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeless.contracts import BoolArray, FloatArray, IntArray
from moeless.jit import njit
from moeless.placement.dealing import TINY
from moeless.placement.elastic_placement import LOADING, WARM, late
from moeless.placement.fastest_dispatch import expected_seconds, seconds_saved
from moeless.placement.plan_scoring import draw_scenarios

#: Parts of a copy's share that one step may hand on.
_PARTS = (1.0, 0.75, 0.5, 0.25)
#: Steps per extra, at most.
_STEPS = 8
#: Scenarios on which a plan is checked by the cost model itself: the first mirrored pairs.
_CHECKED = 4
#: Part of the time that a step has to save.
LEAST = 1e-6


@njit(cache=True, nogil=True, inner=True)
def _leaders(value_CG, top_C3, first_C3):  # type: ignore[no-untyped-def]
    """Of each scenario the three largest values and their GPUs."""
    for i in range(value_CG.shape[0]):
        top_C3[i, :] = 0.0
        first_C3[i, :] = -1
        for g in range(value_CG.shape[1]):
            v = value_CG[i, g]
            for k in range(3):
                if first_C3[i, k] < 0 or v > top_C3[i, k]:
                    for m in range(2, k, -1):
                        top_C3[i, m], first_C3[i, m] = top_C3[i, m - 1], first_C3[i, m - 1]
                    top_C3[i, k], first_C3[i, k] = v, g
                    break


@njit(cache=True, nogil=True, inline="always")
def _beside(top_C3, first_C3, i, g, h):  # type: ignore[no-untyped-def]
    """The largest value of a scenario on any GPU but g and h."""
    for k in range(3):
        if first_C3[i, k] >= 0 and first_C3[i, k] != g and first_C3[i, k] != h:
            return top_C3[i, k]
    return 0.0


@njit(cache=True, nogil=True, inline="always")
def _busy(n, a, b):  # type: ignore[no-untyped-def]
    return max(a * n, b) if n > TINY else 0.0


@njit(cache=True, nogil=True)
def shared_seconds(load_CE, expert_X, gpu_X, share_X, a, b, c, time_CG, tokens_CG):  # type: ignore[no-untyped-def]
    """Mean time of copies with fixed shares over scenarios; fills each GPU's seconds and tokens."""
    time_CG[:] = 0.0
    tokens_CG[:] = 0.0
    total = 0.0
    for i in range(load_CE.shape[0]):
        for x in range(len(expert_X)):
            n = share_X[x] * load_CE[i, expert_X[x]]
            time_CG[i, gpu_X[x]] += _busy(n, a, b)
            tokens_CG[i, gpu_X[x]] += n
        total += time_CG[i].max() + c * tokens_CG[i].max()
    return total / len(load_CE)


class Search(NamedTuple):
    """The copies so far and what they cost: seconds and tokens of each GPU under each scenario, and their largest."""

    load_CE: IntArray
    expert_X: IntArray
    gpu_X: IntArray
    share_X: FloatArray
    at_EG: IntArray
    used_G: IntArray
    room_G: IntArray
    time_CG: FloatArray
    tokens_CG: FloatArray
    slowest_G: BoolArray
    top_C3: FloatArray
    first_C3: IntArray
    most_C3: FloatArray
    whose_C3: IntArray


@njit(cache=True, nogil=True, inner=True)
def _best_part(at, count, spare, score, price, a, b, c):  # type: ignore[no-untyped-def]
    """The best step that hands a part of one copy's tokens to another GPU: its gain, the copy, the GPU, the part."""
    # taken out once: each time costs as much as a step of the loops
    load_CE, expert_X, gpu_X, share_X, at_EG, used_G, room_G, time_CG, tokens_CG = at[:9]
    slowest_G, top_C3, first_C3, most_C3, whose_C3 = at[9:]
    scenarios, num_gpus = time_CG.shape
    best, best_x, best_h, best_part = 0.0, -1, -1, 0.0
    for x in range(count):
        e, g, s = expert_X[x], gpu_X[x], share_X[x]
        if s <= TINY or not slowest_G[g]:
            continue
        for h in range(num_gpus):
            y = at_EG[e, h]
            if h == g or (y < 0 and (spare == 0 or used_G[h] >= room_G[h])):
                continue
            t, paid = (0.0, price) if y < 0 else (share_X[y], 0.0)
            for part in _PARTS:
                moved = part * s
                total, least = 0.0, score * (1 - LEAST) - paid - best
                for i in range(scenarios):
                    n = load_CE[i, e]
                    here = time_CG[i, g] - _busy(s * n, a, b) + _busy((s - moved) * n, a, b)
                    there = time_CG[i, h] - _busy(t * n, a, b) + _busy((t + moved) * n, a, b)
                    total += max(here, there, _beside(top_C3, first_C3, i, g, h)) / scenarios
                    if c > 0.0:
                        here, there = tokens_CG[i, g] - moved * n, tokens_CG[i, h] + moved * n
                        total += c * max(here, there, _beside(most_C3, whose_C3, i, g, h)) / scenarios
                    if total >= least:
                        break
                if total < least:
                    best, best_x, best_h, best_part = score - paid - total, x, h, part
    return best, best_x, best_h, best_part


@njit(cache=True, nogil=True, inner=True)
def _best_swap(at, count, spare, score, price, a, b, c):  # type: ignore[no-untyped-def]
    """The best two copies to change places, -1 where none gain: a primary's place stays, what leaves it is an extra."""
    # taken out once: each time costs as much as a step of the loops
    load_CE, expert_X, gpu_X, share_X, at_EG, used_G, room_G, time_CG, tokens_CG = at[:9]
    slowest_G, top_C3, first_C3, most_C3, whose_C3 = at[9:]
    scenarios, experts = load_CE.shape
    best, best_x, best_y = 0.0, -1, -1
    for x in range(count):
        e, g, s = expert_X[x], gpu_X[x], share_X[x]
        if s <= TINY or not slowest_G[g]:
            continue
        for y in range(count):
            f, h, t = expert_X[y], gpu_X[y], share_X[y]
            if h == g or t <= TINY or at_EG[e, h] >= 0 or at_EG[f, g] >= 0:
                continue
            from_g, from_h = int(x < experts), int(y < experts)
            if from_g + from_h > spare:
                continue
            if used_G[h] + from_h > room_G[h] or used_G[g] + from_g > room_G[g]:
                continue
            paid = price * (from_g + from_h)
            total, least = 0.0, score * (1 - LEAST) - paid - best
            for i in range(scenarios):
                n, m = load_CE[i, e], load_CE[i, f]
                more = _busy(t * m, a, b) - _busy(s * n, a, b)
                here, there = time_CG[i, g] + more, time_CG[i, h] - more
                total += max(here, there, _beside(top_C3, first_C3, i, g, h)) / scenarios
                if c > 0.0:
                    more = t * m - s * n
                    here, there = tokens_CG[i, g] + more, tokens_CG[i, h] - more
                    total += c * max(here, there, _beside(most_C3, whose_C3, i, g, h)) / scenarios
                if total >= least:
                    break
            if total < least:
                best, best_x, best_y = score - paid - total, x, y
    return best_x, best_y


@njit(cache=True, nogil=True, inner=True)
def _give(at, count, x, h, share):  # type: ignore[no-untyped-def]
    """Hand ``share`` of copy x to GPU h; returns the number of copies. An extra that nothing is left of goes."""
    e, experts = at.expert_X[x], len(at.at_EG)
    y = at.at_EG[e, h]
    if y < 0:
        y = count
        at.expert_X[y], at.gpu_X[y], at.share_X[y], at.at_EG[e, h] = e, h, 0.0, y
        at.used_G[h] += 1
        count += 1
    at.share_X[x] -= share
    at.share_X[y] += share
    if at.share_X[x] <= TINY:
        at.share_X[x] = 0.0
        if x >= experts:
            at.at_EG[e, at.gpu_X[x]] = -1
            at.used_G[at.gpu_X[x]] -= 1
            count -= 1
            if x != count:
                # the last copy takes its place
                at.expert_X[x], at.gpu_X[x], at.share_X[x] = at.expert_X[count], at.gpu_X[count], at.share_X[count]
                at.at_EG[at.expert_X[x], at.gpu_X[x]] = x
    return count


@njit(cache=True, nogil=True)
def fix_shares(load_CE, gpu_E, room_G, extra, a, b, c, economy, expert_X, gpu_X, share_X):  # type: ignore[no-untyped-def]
    """Extras and shares by steepest descent from static EP; returns the number of copies and their mean time.

    A step hands a part of one copy's tokens to another GPU, into a copy that is there or a new one; where no step
    gains, two copies change places. A new copy has to save ``economy`` of the time. The first E copies are the
    primaries, which may be left without any share.
    """
    scenarios, experts = load_CE.shape
    num_gpus = len(room_G)
    at = Search(
        load_CE, expert_X, gpu_X, share_X, np.full((experts, num_gpus), -1, np.int64), np.zeros(num_gpus, np.int64),
        room_G, np.empty((scenarios, num_gpus)), np.empty((scenarios, num_gpus)), np.empty(num_gpus, np.bool_),
        np.empty((scenarios, 3)), np.empty((scenarios, 3), np.int64), np.empty((scenarios, 3)),
        np.empty((scenarios, 3), np.int64),
    )  # fmt: skip
    for e in range(experts):
        expert_X[e], gpu_X[e], share_X[e] = e, gpu_E[e], 1.0
        at.at_EG[e, gpu_E[e]] = e
        at.used_G[gpu_E[e]] += 1
    count = experts
    score = shared_seconds(load_CE, expert_X[:count], gpu_X[:count], share_X[:count], a, b, c, at.time_CG, at.tokens_CG)
    for _ in range(_STEPS * extra):
        _leaders(at.time_CG, at.top_C3, at.first_C3)
        _leaders(at.tokens_CG, at.most_C3, at.whose_C3)
        at.slowest_G[:] = False
        for i in range(scenarios):
            at.slowest_G[at.first_C3[i, 0]] = True
            if c > 0.0:
                at.slowest_G[at.whose_C3[i, 0]] = True
        spare, price = extra - (count - experts), economy * score
        _, x, h, part = _best_part(at, count, spare, score, price, a, b, c)
        if x >= 0:
            count = _give(at, count, x, h, part * share_X[x])
        else:
            x, y = _best_swap(at, count, spare, score, price, a, b, c)
            if x < 0:
                break
            g, h = gpu_X[x], gpu_X[y]
            # the places that extras leave are free before others come; giving may renumber copies
            for z in (max(x, y), min(x, y)):
                if z >= experts:
                    to = h if z == x else g
                    at.at_EG[expert_X[z], gpu_X[z]], at.at_EG[expert_X[z], to] = -1, z
                    at.used_G[gpu_X[z]] -= 1
                    at.used_G[to] += 1
                    gpu_X[z] = to
            if x < experts:
                count = _give(at, count, x, h, share_X[x])
            if y < experts:
                count = _give(at, count, y, g, share_X[y])
        score = shared_seconds(
            load_CE, expert_X[:count], gpu_X[:count], share_X[:count], a, b, c, at.time_CG, at.tokens_CG
        )
    return count, score


@njit(cache=True, nogil=True)
def _fits(expert_P, gpu_P, share_P, terms):  # type: ignore[no-untyped-def]
    """Whether a previous plan, primaries first, has fixed shares and the room it takes is still there."""
    experts = len(terms.gpu_E)
    if len(share_P) < experts or len(share_P) > experts + terms.extra:
        return False
    used_G = np.zeros(len(terms.room_G), np.int64)
    for p in range(len(share_P)):
        used_G[gpu_P[p]] += 1
        if p < experts and (expert_P[p] != p or gpu_P[p] != terms.gpu_E[p]):
            return False
    full = True
    for g in range(len(used_G)):
        full = full and used_G[g] <= terms.room_G[g]
    return full


@njit(cache=True, nogil=True, inner=True)
def weigh_fixed(  # type: ignore[no-untyped-def]
    mean_E, var_E, spread, normal_CE, terms, base_expert_R, base_gpu_R, expert_P, gpu_P, live_P, share_P, horizon,
    lead, copy_G, control, caution, margin, expert_R, gpu_R, share_R,
):  # fmt: skip
    """Copies with fixed shares where they beat static EP and the plan ``base``; returns their number, or 0.

    Args:
        base_expert_R, base_gpu_R: extras with dispatch after the gate, behind the primaries; its ``control`` counts.
        expert_P, gpu_P, live_P, share_P: the previous plan, primaries first where it has shares.
        caution: standard deviations of the gain, over scenarios, that are left out of it.
        margin: part of static EP's time that is left out of it besides.
    """
    a, b, c, gpu_E, experts = terms.a, terms.b, terms.c, terms.gpu_E, len(terms.gpu_E)
    num_gpus = len(terms.room_G)
    if mean_E.max() <= 0.0:
        return 0
    load_CE = np.empty(normal_CE.shape, np.int64)
    load_CE = load_CE[: draw_scenarios(mean_E, var_E, spread, normal_CE, load_CE)]
    # judged on other loads than those that the shares are fitted to: noise that was fitted is no gain
    fit_CE = load_CE[: (len(load_CE) + 1) // 2]
    load_CE = load_CE[len(load_CE) // 2 :]
    scenarios = len(load_CE)
    time_CG, tokens_CG = np.empty((scenarios, num_gpus)), np.empty((scenarios, num_gpus))
    plain_C, gain_C = np.empty(scenarios), np.empty(scenarios)
    one_E = np.ones(experts)
    shared_seconds(load_CE, base_expert_R[:experts], base_gpu_R[:experts], one_E, a, b, c, time_CG, tokens_CG)
    for i in range(scenarios):
        plain_C[i] = time_CG[i].max() + c * tokens_CG[i].max()
    other = 0.0
    if len(base_expert_R) > experts:
        static, dispatched = expected_seconds(
            load_CE, base_expert_R, base_gpu_R, num_gpus, a, b, c, terms.depth, terms.fuel
        )
        other = max(static - dispatched - control, 0.0)
    count, _ = fix_shares(fit_CE, gpu_E, terms.room_G, terms.extra, a, b, c, terms.economy, expert_R, gpu_R, share_R)
    delay = 0.0
    if len(expert_P) > 0:
        delay = late(expert_R[experts:count], gpu_R[experts:count], expert_P, gpu_P, live_P, copy_G, lead)
    if _fits(expert_P, gpu_P, share_P, terms):
        reached = shared_seconds(load_CE, expert_R[:count], gpu_R[:count], share_R[:count], a, b, c, time_CG, tokens_CG)
        kept = shared_seconds(load_CE, expert_P, gpu_P, share_P, a, b, c, time_CG, tokens_CG)
        if (kept - reached) * horizon <= delay - late(
            expert_P[experts:], gpu_P[experts:], expert_P, gpu_P, live_P, copy_G, lead
        ):
            count, delay = len(expert_P), 0.0
            expert_R[:count], gpu_R[:count], share_R[:count] = expert_P, gpu_P, share_P
    if count == experts:
        return 0
    shared_seconds(load_CE, expert_R[:count], gpu_R[:count], share_R[:count], a, b, c, time_CG, tokens_CG)
    for i in range(scenarios):
        gain_C[i] = plain_C[i] - time_CG[i].max() - c * tokens_CG[i].max()
    ahead = gain_C.mean() - caution * gain_C.std() - margin * plain_C.mean() - other
    return count if ahead > 0.0 and ahead * horizon > delay else 0


class FixedTerms(NamedTuple):
    """What weighing fixed shares needs beside the elastic planner's terms; see ``ElasticAheadParams``.

    Attributes:
        normal_CE: standard normal deviates of the scenarios.
        control_L: seconds that dispatch after the gate takes in each layer.
        caution: standard deviations of the gain, over scenarios, that are left out of it.
        margin: part of static EP's time that is left out of it besides.
    """

    normal_CE: FloatArray
    control_L: FloatArray
    caution: float
    margin: float


@njit(cache=True, nogil=True, inner=True)
def _before(r, q, expert_R, primary_R):  # type: ignore[no-untyped-def]
    """Whether replica r goes before q where primaries are first, then experts ascend."""
    if primary_R[r] != primary_R[q]:
        return primary_R[r]
    return expert_R[r] < expert_R[q]


@njit(cache=True, nogil=True, inner=True)
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


@njit(cache=True, nogil=True, inner=True)
def _into_order(count, experts, expert_R, gpu_R, share_R, n, rows):  # type: ignore[no-untyped-def]
    """Copies, primaries first, into the layer's row in a plan's order: GPU, primary first, expert."""
    for i in range(count):
        at = i
        while at > 0:
            g, e = rows.gpu_NR[n, at - 1], rows.expert_NR[n, at - 1]
            primary = rows.primary_NR[n, at - 1]
            mine = i < experts
            if g < gpu_R[i] or (g == gpu_R[i] and (primary > mine or (primary == mine and e <= expert_R[i]))):
                break
            rows.gpu_NR[n, at], rows.expert_NR[n, at] = g, e
            rows.primary_NR[n, at], rows.share_NR[n, at] = primary, rows.share_NR[n, at - 1]
            at -= 1
        rows.gpu_NR[n, at], rows.expert_NR[n, at] = gpu_R[i], expert_R[i]
        rows.primary_NR[n, at], rows.share_NR[n, at] = i < experts, share_R[i]


@njit(cache=True, nogil=True, inner=True)
def _shared_before(n, previous):  # type: ignore[no-untyped-def]
    """A layer's copies before, which are in memory, and their shares; of fixed shares those in use."""
    first, last = previous.first_N[n], previous.first_N[n + 1]
    expert_P, gpu_P, state_P = previous.expert_P[first:last], previous.gpu_P[first:last], previous.state_P[first:last]
    primary_P, share_P = previous.primary_P[first:last], previous.share_P[first:last]
    if previous.fixed_N[n]:
        # copies that linger in memory beside the plan have no share
        used = np.flatnonzero(primary_P | (share_P > 0))
        order = used[_primaries_first(expert_P[used], primary_P[used])]
        expert_P, gpu_P, state_P, share_P = expert_P[order], gpu_P[order], state_P[order], share_P[order]
    else:
        share_P = share_P[:0]
    live_P = np.empty(len(state_P), np.bool_)
    for p in range(len(state_P)):
        live_P[p] = state_P[p] == WARM or state_P[p] == LOADING
    return expert_P, gpu_P, live_P, share_P


@njit(cache=True, nogil=True)
def fix_layers(  # type: ignore[no-untyped-def]
    start, stop, layer_N, mean_NE, var_NE, spread, previous, horizon_N, lead_N, copy_G, fixed, terms, costs, rows
):
    """Replace elastic's plans by ones with fixed shares where these are expected to be faster.

    Args:
        spread: relative spread that the forecast has at least.
        copy_G: seconds in which an expert comes to each GPU.
        fixed, terms: of the two planners.
        rows: elastic's plans.
    """
    experts = mean_NE.shape[1]
    size = experts + terms.extra
    if terms.extra == 0 or len(terms.room_G) == 1 or len(fixed.normal_CE) == 0:
        return
    for n in range(start, stop):
        control = fixed.control_L[layer_N[n]]
        if control <= 0.0:
            continue
        count = rows.count_N[n]
        order_R = _primaries_first(rows.expert_NR[n, :count], rows.primary_NR[n, :count])
        base_expert_R, base_gpu_R = rows.expert_NR[n, :count][order_R], rows.gpu_NR[n, :count][order_R]
        expert_P, gpu_P, live_P, share_P = _shared_before(n, previous)
        expert_R, gpu_R, share_R = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size)
        count = weigh_fixed(
            mean_NE[n], var_NE[n], spread, fixed.normal_CE, terms, base_expert_R, base_gpu_R, expert_P, gpu_P, live_P,
            share_P, horizon_N[n] if horizon_N[n] > 0 else terms.patience, lead_N[n], copy_G, control, fixed.caution,
            fixed.margin, expert_R, gpu_R, share_R,
        )  # fmt: skip
        if count > 0 and len(costs.tables.tokens_N) > 0:
            load_CE, primary_R = np.empty((_CHECKED, experts), np.int64), np.arange(count) < experts
            drawn = draw_scenarios(mean_NE[n], var_NE[n], spread, fixed.normal_CE[:_CHECKED], load_CE)
            saved = seconds_saved(
                load_CE[:drawn], expert_R[:count], gpu_R[:count], primary_R, share_R[:count], len(terms.room_G),
                terms.numbers, costs,
            )  # fmt: skip
            count = count if saved > 0.0 else 0
        if count > 0:
            _into_order(count, experts, expert_R, gpu_R, share_R, n, rows)
            rows.count_N[n], rows.fixed_N[n] = count, True
