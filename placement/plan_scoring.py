"""Compiled scoring of plans on loads that a forecast deems likely, from static EP's time to any plan's least.

Axes: C scenarios, E experts, G GPUs, X extras in order of decision, M movable copies sorted by GPU, N counts.
"""

from __future__ import annotations

from functools import cache
from math import erfc, sqrt
from typing import Any, NamedTuple

import numpy as np

from moeless.compiled_call import function_address
from moeless.contracts import FloatArray, Int32Array, IntArray
from moeless.jit import njit
from moeless.placement.dispatch_search import GpuLoad, MovableCopies, Rates, busy_seconds, search, search_memory

#: Rounding that a bound must leave to the times it is compared with.
SLACK = 1e-9
#: How much slower than the best so far a plan may be after some scenarios and still be scored on the others.
CLEARLY = 1.01
#: Mean tokens up to which scenarios count tokens; above it their law is a normal one.
FEW = 16.0
#: Counts at which the law of few tokens is cut off.
MOST_FEW = 1025
HALF = sqrt(0.5)


class Scenarios(NamedTuple):
    """Loads to score plans on, with what each adds to a mean time.

    Attributes:
        load_CE: tokens of each expert.
        static_CG, tokens_CG: static EP's seconds and tokens of each GPU.
        bound_C: what each adds to the mean time of any plan at least.
        rest_C: the same for each and all after it.
        static_seconds: static EP's mean time.
    """

    load_CE: IntArray
    static_CG: FloatArray
    tokens_CG: IntArray
    bound_C: FloatArray
    rest_C: FloatArray
    static_seconds: float


@njit(cache=True, nogil=True, allocates=False)
def draw_few_tokens(mean: float, var: float, normal_C: FloatArray, count_C: IntArray, below_N: FloatArray) -> None:
    """The counts that standard normal deviates stand for, of a negative binomial law (of Poisson's at equal variance).

    Few tokens are not spread evenly about their mean: an expert with a tenth of a token on average has none or one,
    and one that is rarely active costs a whole weight read when it is. ``below_N`` is working memory, ``MOST_FEW``
    numbers or more: the law's distribution function, as far as it is asked for.
    """
    fails = max(1.0 - mean / var, 0.0)
    if fails > 1e-9:
        size = mean * (1.0 - fails) / fails
        part = (1.0 - fails) ** size
    else:
        # the limit of the rule below: mean / (count + 1)
        size, part, fails = 0.0, np.exp(-mean), 0.0
    known, total = 1, part
    below_N[0] = total
    for i in range(len(normal_C)):
        below = 0.5 * erfc(-normal_C[i] * HALF)
        while total < below and known < MOST_FEW:
            part *= (fails * (known - 1 + size) if fails > 0.0 else mean) / known
            total += part
            below_N[known] = total
            known += 1
        count = 0
        while count < known - 1 and below_N[count] < below:
            count += 1
        count_C[i] = count


@njit(cache=True, nogil=True)
def draw_scenarios(
    mean_E: FloatArray, var_E: FloatArray, doubt: float, normal_CE: FloatArray, load_CE: IntArray
) -> int:
    """Loads that a forecast deems likely; returns how many rows of ``load_CE`` are filled.

    The spread is the forecast's own, but never less than counting noise or ``doubt`` of the mean: history states no
    more than counting noise, and is further off than that. A forecast without any variance is taken to be exact.
    """
    exact = True
    for e in range(len(mean_E)):
        exact = exact and var_E[e] == 0.0
    rows = min(1, len(normal_CE)) if exact else len(normal_CE)
    below_N = np.empty(MOST_FEW)
    for e in range(len(mean_E)):
        spread = 0.0
        if not exact:
            spread = np.sqrt(max(var_E[e], mean_E[e], (doubt * mean_E[e]) ** 2))
        if 0.0 < mean_E[e] <= FEW and spread > 0.0:
            draw_few_tokens(mean_E[e], spread * spread, normal_CE[:rows, e], load_CE[:rows, e], below_N)
            continue
        for i in range(rows):
            load_CE[i, e] = np.int64(np.rint(max(mean_E[e] + spread * normal_CE[i, e], 0.0)))
    return rows


@njit(cache=True, nogil=True)
def score_static(load_CE: IntArray, gpu_E: IntArray, num_gpus: int, max_extra: int, rates: Rates) -> Scenarios:
    """Static EP on each scenario, and what no plan with at most ``max_extra`` extras can undercut.

    As in ``bound.layer_bound``: splitting an expert never lowers its summed time, some GPU serves at least its share
    of the loaded experts, and an expert has at most ``max_extra + 1`` copies.
    """
    num_scenarios, num_experts = load_CE.shape
    copies = min(num_gpus, max_extra + 1)
    static_CG, tokens_CG = np.zeros((num_scenarios, num_gpus)), np.zeros((num_scenarios, num_gpus), np.int64)
    bound_C, rest_C, static_seconds = np.empty(num_scenarios), np.empty(num_scenarios), 0.0
    for i in range(num_scenarios):
        loaded, largest = 0, 0
        for e in range(num_experts):
            tokens = load_CE[i, e]
            if tokens > 0:
                static_CG[i, gpu_E[e]] += busy_seconds(tokens, rates)
                tokens_CG[i, gpu_E[e]] += tokens
                loaded += 1
                largest = max(largest, tokens)
        slowest, fullest, all_seconds, all_tokens = 0.0, 0, 0.0, 0
        for g in range(num_gpus):
            slowest, fullest = max(slowest, static_CG[i, g]), max(fullest, tokens_CG[i, g])
            all_seconds += static_CG[i, g]
            all_tokens += tokens_CG[i, g]
        static_seconds += (slowest + rates.exchange_seconds * fullest) / num_scenarios
        least = max(all_seconds / num_gpus, ((loaded + num_gpus - 1) // num_gpus) * rates.floor_seconds)
        if largest > 0:
            least = max(least, rates.token_seconds * ((largest + copies - 1) // copies))
        least += rates.exchange_seconds * ((all_tokens + num_gpus - 1) // num_gpus)
        bound_C[i] = least * (1 - SLACK) / num_scenarios
    rest = 0.0
    for i in range(num_scenarios - 1, -1, -1):
        rest += bound_C[i]
        rest_C[i] = rest
    return Scenarios(load_CE, static_CG, tokens_CG, bound_C, rest_C, static_seconds)


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _gather_movable(
    load_E: IntArray,
    expert_X: Int32Array,
    gpu_X: Int32Array,
    gpu_E: IntArray,
    copies: MovableCopies,
    home_E: IntArray,
    fill_G: IntArray,
) -> int:
    """Fill ``copies`` with the loaded experts that have extras, all tokens on their primaries; returns their number.

    ``home_E`` is -1 everywhere, before and after.
    """
    tokens_M, gpu_M, next_M, first_G = copies
    for g in range(len(first_G)):
        first_G[g] = 0
    # an expert's first extra brings its primary along
    for x in range(len(expert_X)):
        expert = expert_X[x]
        if load_E[expert] > 0:
            if home_E[expert] < 0:
                home_E[expert] = 0
                first_G[gpu_E[expert] + 1] += 1
            first_G[gpu_X[x] + 1] += 1
    for g in range(len(fill_G)):
        first_G[g + 1] += first_G[g]
        fill_G[g] = first_G[g]
    for x in range(len(expert_X)):
        home_E[expert_X[x]] = -1
    for x in range(len(expert_X)):
        expert, gpu = expert_X[x], gpu_X[x]
        if load_E[expert] == 0:
            continue
        if home_E[expert] < 0:
            home = fill_G[gpu_E[expert]]
            fill_G[gpu_E[expert]] += 1
            home_E[expert] = home
            tokens_M[home], gpu_M[home], next_M[home] = load_E[expert], gpu_E[expert], home
        copy, home = fill_G[gpu], home_E[expert]
        fill_G[gpu] += 1
        tokens_M[copy], gpu_M[copy], next_M[copy] = 0, gpu, next_M[home]
        next_M[home] = copy
    for x in range(len(expert_X)):
        home_E[expert_X[x]] = -1
    return int(first_G[len(fill_G)])


@njit(cache=True, nogil=True)
def mean_seconds(
    scenarios: Scenarios,
    expert_X: Int32Array,
    gpu_X: Int32Array,
    gpu_E: IntArray,
    rates: Rates,
    depth: int,
    fuel: int,
    worst: float,
    pace_C: FloatArray,
    sum_C: FloatArray,
) -> float:
    """Mean time over scenarios with these extras; infinite as soon as it is bound to exceed ``worst``.

    ``sum_C[i]`` gets what the scenarios up to i took. Infinite too where that is clearly more than ``pace_C[i]``, the
    best plan's so far, after the first pair of scenarios. A single scenario is an exact forecast: searched as the
    dispatch does.
    """
    num_scenarios, num_gpus = scenarios.static_CG.shape
    home_E, most = np.full(len(gpu_E), -1, np.int64), 2 * len(expert_X)
    first_G, fill_G = np.empty(num_gpus + 1, np.int64), np.empty(num_gpus, np.int64)
    room = MovableCopies(np.empty(most, np.int64), np.empty(most, np.uint32), np.empty(most, np.uint32), first_G)
    load = GpuLoad(np.empty(num_gpus), np.empty(num_gpus, np.int64))
    memory, total = search_memory(most, num_gpus), 0.0
    for i in range(num_scenarios):
        if total + scenarios.rest_C[i] > worst:
            return np.inf
        for g in range(num_gpus):
            load.seconds_G[g], load.tokens_G[g] = scenarios.static_CG[i, g], scenarios.tokens_CG[i, g]
        count = _gather_movable(scenarios.load_CE[i], expert_X, gpu_X, gpu_E, room, home_E, fill_G)
        copies = MovableCopies(room.tokens_M[:count], room.gpu_M[:count], room.next_M[:count], first_G)
        total += search(copies, load, rates, depth, fuel, num_scenarios == 1, memory) / num_scenarios
        sum_C[i] = total
        if i > 0 and total > CLEARLY * pace_C[i]:
            return np.inf
    return total


@cache
def mean_seconds_address() -> Any:
    """Where :func:`mean_seconds` is, see :mod:`moeless.compiled_call`."""
    whole, real = np.zeros((1, 1), np.int64), np.zeros((1, 1))
    judged, short = Scenarios(whole, real, whole, real[0], real[0], 1.0), np.zeros(0, np.int32)
    return function_address(
        mean_seconds, 0.0, (judged, short, short, whole[0], Rates(1.0, 1.0, 1.0), 1, 1, 1.0, real[0], real[0])
    )
