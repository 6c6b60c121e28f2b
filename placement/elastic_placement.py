"""Compiled placement of a layer: grow by several rules, judge on scenarios, drop the last extras, weigh the change.

Axes: C scenarios, E experts, X extras in order of decision, R replicas, G GPUs, N layers of a batch, P a previous
plan's replicas.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from moeless.compiled_call import seconds_at
from moeless.contracts import FloatArray, InstanceState, IntArray
from moeless.jit import njit
from moeless.placement.dispatch_search import Rates
from moeless.placement.extra_copies import BY_EXPERT, BY_GPU, BY_LEVEL, add_extra_copies
from moeless.placement.fastest_dispatch import seconds_saved
from moeless.placement.plan_scoring import draw_scenarios, score_static

#: Rules tried, with whether they grow by likely time rather than by mean tokens. Ties: the first.
_RULES = ((BY_LEVEL, False), (BY_EXPERT, False), (BY_GPU, True), (BY_LEVEL, True))
#: Control times that dispatch saves beyond doubt, whatever the scenarios' spread.
_SURELY = 3.0
LOADING, WARM = int(InstanceState.LOADING), int(InstanceState.WARM)
#: Scenarios on which a plan is checked by the cost model itself: the first mirrored pairs.
_CHECKED = 4


class ChoiceTerms(NamedTuple):
    """What the choice needs beside the forecast.

    Attributes:
        normal_CE: standard normal deviates of the scenarios; none: the first rule's plan, not judged.
        gpu_E, room_G, extra: static GPU of each expert, replicas that each GPU may hold, extras that fit.
        a, b, c: seconds per token, weight read, exchange per token.
        depth, fuel: of the search that stands for the dispatch.
        economy, caution: as ``economy`` and ``skip_caution`` in ``ElasticParams``.
        skip_L: seconds that dispatch must be expected to save in each layer; negative: any saving is welcome.
        patience: iterations that a change's gain is weighed over where nobody knows better.
        numbers: of the dispatch rule.
        mean_seconds: where ``plan_scoring.mean_seconds`` is: linked into each function that calls it, it would be
            optimised again in each.
    """

    normal_CE: FloatArray
    gpu_E: IntArray
    room_G: IntArray
    extra: int
    a: float
    b: float
    c: float
    depth: int
    fuel: int
    economy: float
    caution: float
    skip_L: FloatArray
    patience: int
    numbers: FloatArray
    mean_seconds: Any


@njit(cache=True, nogil=True)
def _fewest(  # type: ignore[no-untyped-def]
    judged, weight_2E, terms, fuel, expert_R, gpu_R
):
    """The fewest extras whose time is within ``economy`` of the best rule's; returns their number and mean time."""
    rates, gpu_E, plain = Rates(terms.a, terms.b, terms.c), terms.gpu_E, judged.static_seconds
    experts, scenarios = len(gpu_E), len(judged.load_CE)
    expert_XR, gpu_XR = np.empty((4, len(expert_R)), np.int32), np.empty((4, len(expert_R)), np.int32)
    count_X = np.zeros(4, np.int64)
    best, least = 0, np.inf
    pace_C, sum_C = np.full(scenarios, np.inf), np.empty(scenarios)
    for x, (rule, likely) in enumerate(_RULES):
        count_X[x] = add_extra_copies(
            weight_2E[1 if likely else 0], gpu_E, terms.room_G, terms.extra, rule, expert_XR[x], gpu_XR[x]
        )
        again = False
        for y in range(x):
            same = count_X[y] == count_X[x]
            for r in range(experts, count_X[x]):
                same = same and expert_XR[x, r] == expert_XR[y, r] and gpu_XR[x, r] == gpu_XR[y, r]
            again = again or same
        if not again:
            score = seconds_at(
                terms.mean_seconds, judged, expert_XR[x, experts : count_X[x]], gpu_XR[x, experts : count_X[x]], gpu_E,
                rates, terms.depth, fuel, least, pace_C, sum_C,
            )  # fmt: skip
            if score < least:
                best, least = x, score
                pace_C[:] = sum_C
    expert_R[:], gpu_R[:] = expert_XR[best], gpu_XR[best]
    # copies are in order of worth: leave out the last ones as long as little is lost
    high, reached, enough = count_X[best] - experts, least, least * (1 + terms.economy)
    if plain <= enough:
        return 0, plain
    pace_C *= 1 + terms.economy
    step = max(high // 8, 1)
    while high > 1:
        fewer = max(high - step, 1)
        score = seconds_at(
            terms.mean_seconds, judged, expert_R[experts : experts + fewer], gpu_R[experts : experts + fewer], gpu_E,
            rates, terms.depth, fuel, enough, pace_C, sum_C,
        )  # fmt: skip
        if score > enough:
            break
        high, reached, step = fewer, score, 2 * step
    return high, reached


@njit(cache=True, nogil=True)
def arrival(expert_X, gpu_X, expert_P, gpu_P, live_P, copy_G):  # type: ignore[no-untyped-def]
    """When the last copy that is not in memory would have come, GPUs loading at once; nothing is absent at a start."""
    waiting_G = np.zeros(len(copy_G))
    if len(expert_P) == 0:
        return 0.0
    for x in range(len(expert_X)):
        absent = True
        for p in range(len(expert_P)):
            if live_P[p] and expert_P[p] == expert_X[x] and gpu_P[p] == gpu_X[x]:
                absent = False
                break
        if absent:
            waiting_G[gpu_X[x]] += copy_G[gpu_X[x]]
    return waiting_G.max()


@njit(cache=True, nogil=True)
def late(expert_X, gpu_X, expert_P, gpu_P, live_P, copy_G, lead):  # type: ignore[no-untyped-def]
    """Seconds by which the last copy would come after ``lead`` seconds from now."""
    return max(arrival(expert_X, gpu_X, expert_P, gpu_P, live_P, copy_G) - lead, 0.0)


@njit(cache=True, nogil=True, inner=True)
def _previous_extras(expert_P, gpu_P, primary_P, terms):  # type: ignore[no-untyped-def]
    """Positions of the previous plan's extras, and whether it is a plan of this planner that still fits."""
    extras, primaries, used_G = np.empty(len(expert_P), np.int64), 0, np.zeros(len(terms.room_G), np.int64)
    count, fits = 0, len(expert_P) > 0
    for p in range(len(expert_P)):
        used_G[gpu_P[p]] += 1
        if primary_P[p]:
            primaries += 1
            fits = fits and terms.gpu_E[expert_P[p]] == gpu_P[p]
        else:
            extras[count] = p
            count += 1
    for g in range(len(used_G)):
        fits = fits and used_G[g] <= terms.room_G[g]
    return extras[:count], fits and primaries == len(terms.gpu_E) and count <= terms.extra


@njit(cache=True, nogil=True)
def choose(  # type: ignore[no-untyped-def]
    mean_E, var_E, doubt, expert_P, gpu_P, primary_P, live_P, horizon, lead, copy_G, skip, terms, expert_R, gpu_R
):
    """Extras of one layer, into ``expert_R`` and ``gpu_R`` after its primaries; returns the number of replicas.

    Args:
        doubt: relative spread that the forecast has at least.
        expert_P, gpu_P, primary_P, live_P: the previous plan, and which of its copies are in memory; empty: none.
        horizon: iterations that a change's gain is weighed over.
        lead, copy_G: seconds until the layer begins, and seconds in which an expert comes to each GPU.
        skip: seconds that dispatch must be expected to save; negative: any saving is welcome.

    What it saves is counted less ``terms.caution`` of its standard errors over the scenarios.
    """
    a, b, c, gpu_E, experts = terms.a, terms.b, terms.c, terms.gpu_E, len(terms.gpu_E)
    num_gpus = len(terms.room_G)
    for e in range(experts):
        expert_R[e], gpu_R[e] = e, gpu_E[e]
    if terms.extra == 0 or num_gpus == 1 or mean_E.max() <= 0.0:
        return experts
    if len(terms.normal_CE) == 0:
        return add_extra_copies(mean_E, gpu_E, terms.room_G, terms.extra, BY_LEVEL, expert_R, gpu_R)
    load_CE = np.empty(terms.normal_CE.shape, np.int64)
    load_CE = load_CE[: draw_scenarios(mean_E, var_E, doubt, terms.normal_CE, load_CE)]
    scenarios = len(load_CE)
    rates = Rates(a, b, c)
    judged = score_static(load_CE, gpu_E, num_gpus, terms.extra, rates)
    plain = judged.static_seconds
    if skip >= 0.0 and plain - judged.rest_C[0] <= skip:
        # not even the best plan there could be would pay
        return experts
    weight_2E = np.empty((2, experts))
    for e in range(experts):
        # an expert without tokens costs nothing, any other at least its weight read
        n = mean_E[e]
        weight_2E[0, e] = n
        weight_2E[1, e] = max(a * n, b * -np.expm1(-n)) + c * n
    # an exact forecast is one scenario, judged the more closely
    fuel = terms.fuel * (len(terms.normal_CE) // scenarios)
    count, reached = _fewest(judged, weight_2E, terms, fuel, expert_R, gpu_R)
    extras, fits = _previous_extras(expert_P, gpu_P, primary_P, terms)
    if fits:
        old_expert, old_gpu = expert_P[extras], gpu_P[extras]
        kept = seconds_at(
            terms.mean_seconds, judged, old_expert, old_gpu, gpu_E, rates, terms.depth, fuel, np.inf,
            np.full(scenarios, np.inf), np.empty(scenarios),
        )  # fmt: skip
        delay = late(
            expert_R[experts : experts + count], gpu_R[experts : experts + count], expert_P, gpu_P, live_P, copy_G, lead
        ) - late(old_expert, old_gpu, expert_P, gpu_P, live_P, copy_G, lead)
        gain = (kept - reached) * horizon
        if gain <= delay:
            count, reached = len(extras), kept
            expert_R[experts : experts + count], gpu_R[experts : experts + count] = old_expert, old_gpu
    if skip >= 0.0 and plain - reached <= skip:
        return experts
    if skip > 0.0 and plain - reached <= _SURELY * skip and terms.caution > 0.0 and scenarios > 1:
        sum_C = np.empty(scenarios)
        seconds_at(
            terms.mean_seconds, judged, expert_R[experts : experts + count], gpu_R[experts : experts + count], gpu_E,
            rates, terms.depth, fuel, np.inf, np.full(scenarios, np.inf), sum_C,
        )  # fmt: skip
        saved, square = 0.0, 0.0
        for i in range(scenarios):
            mine = (sum_C[i] - (sum_C[i - 1] if i > 0 else 0.0)) * scenarios
            gain = judged.static_CG[i].max() + c * judged.tokens_CG[i].max() - mine
            saved += gain / scenarios
            square += gain * gain / scenarios
        error = np.sqrt(max(square - saved * saved, 0.0) / (scenarios - 1))
        if saved - terms.caution * error <= skip:
            return experts
    return experts + count


@njit(cache=True, nogil=True)
def sort_plan(count, terms, expert_R, gpu_R, primary_R):  # type: ignore[no-untyped-def]
    """Bring replicas (primaries of ascending experts first) into a plan's order: GPU, primary first, expert."""
    experts = len(terms.gpu_E)
    raw_expert, raw_gpu = expert_R[:count].copy(), gpu_R[:count].copy()
    at_G = np.zeros(len(terms.room_G) + 1, np.int64)
    for r in range(count):
        at_G[raw_gpu[r] + 1] += 1
    for g in range(len(terms.room_G)):
        at_G[g + 1] += at_G[g]
    first_G = at_G.copy()
    for r in range(count):
        g = raw_gpu[r]
        i = at_G[g]
        at_G[g] += 1
        while r >= experts and i > first_G[g] and not primary_R[i - 1] and expert_R[i - 1] > raw_expert[r]:
            expert_R[i], gpu_R[i], primary_R[i] = expert_R[i - 1], gpu_R[i - 1], primary_R[i - 1]
            i -= 1
        expert_R[i], gpu_R[i], primary_R[i] = raw_expert[r], g, r < experts


@njit(cache=True, nogil=True)
def choose_layers(  # type: ignore[no-untyped-def]
    start, stop, layer_N, mean_NE, var_NE, doubt, previous, horizon_N, lead_N, copy_G, terms, rows
):
    """Layers ``start`` to ``stop`` of a batch, one after the other, into their rows, which are in a plan's order."""
    for n in range(start, stop):
        old = slice(previous.first_N[n], previous.first_N[n + 1])
        state_P = previous.state_P[old]
        live_P = np.empty(len(state_P), np.bool_)
        for p in range(len(state_P)):
            live_P[p] = state_P[p] == WARM or state_P[p] == LOADING
        expert_R, gpu_R, primary_R = rows.expert_NR[n], rows.gpu_NR[n], rows.primary_NR[n]
        count = choose(
            mean_NE[n], var_NE[n], doubt, previous.expert_P[old], previous.gpu_P[old], previous.primary_P[old], live_P,
            horizon_N[n] if horizon_N[n] > 0 else terms.patience, lead_N[n], copy_G, terms.skip_L[layer_N[n]], terms,
            expert_R, gpu_R,
        )  # fmt: skip
        sort_plan(count, terms, expert_R, gpu_R, primary_R)
        rows.count_N[n], rows.fixed_N[n] = count, False


@njit(cache=True, nogil=True)
def check_layers(start, stop, layer_N, mean_NE, var_NE, doubt, terms, costs, rows):  # type: ignore[no-untyped-def]
    """Leave out the extras where the cost model itself does not see their dispatch save more than its control time.

    The search knows a cost model by straight lines. Where it is a table (of measurements), these may promise more than
    the table keeps: an exchange, say, whose time hardly depends on its bytes.
    """
    experts = mean_NE.shape[1]
    normal_CE = terms.normal_CE if len(terms.normal_CE) > 0 else np.zeros((1, experts))
    load_CE = np.empty(normal_CE.shape, np.int64)
    for n in range(start, stop):
        count, skip = rows.count_N[n], terms.skip_L[layer_N[n]]
        if count == experts or skip < 0.0:
            continue
        expert_R, gpu_R, primary_R = rows.expert_NR[n], rows.gpu_NR[n], rows.primary_NR[n]
        checked = min(draw_scenarios(mean_NE[n], var_NE[n], doubt, normal_CE, load_CE), _CHECKED)
        saved = seconds_saved(
            load_CE[:checked], expert_R[:count], gpu_R[:count], primary_R[:count], np.empty(0), len(terms.room_G),
            terms.numbers, costs,
        )  # fmt: skip
        if saved <= skip:
            for e in range(experts):
                expert_R[e], gpu_R[e] = e, terms.gpu_E[e]
            sort_plan(experts, terms, expert_R, gpu_R, primary_R)
            rows.count_N[n] = experts
