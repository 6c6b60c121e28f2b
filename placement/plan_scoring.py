"""Compiled judgement of placements: likely loads, static EP's time under them, any plan's least, a plan's own.

Axes: C scenarios, E experts, G GPUs, X extras in order of decision, M movable copies sorted by GPU.
"""

from __future__ import annotations

from math import erfc, sqrt

import numpy as np

from moeless.jit import njit
from moeless.placement.dispatch_search import Copies, copies_in, search, working_memory

#: Rounding that a bound must leave to the times it is compared with.
SLACK = 1e-9
#: How much slower than the best so far a plan may be after some scenarios and still be judged on the others.
CLEARLY = 1.01
#: Mean tokens up to which scenarios count tokens; above it their law is a normal one.
FEW = 16.0
#: Counts at which the law of few tokens is cut off.
MOST_FEW = 1025
HALF = sqrt(0.5)


@njit(cache=True, nogil=True)
def few_tokens(mean, var, normal_C, count_C, below_W):  # type: ignore[no-untyped-def]
    """The counts that standard normal deviates stand for, of a negative binomial law (of Poisson's at equal variance).

    Few tokens are not spread evenly about their mean: an expert with a tenth of a token on average has none or one,
    and one that is rarely active costs a whole weight read when it is. ``below_W`` is working memory, ``MOST_FEW``
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
    below_W[0] = total
    for i in range(len(normal_C)):
        below = 0.5 * erfc(-normal_C[i] * HALF)
        while total < below and known < MOST_FEW:
            part *= (fails * (known - 1 + size) if fails > 0.0 else mean) / known
            total += part
            below_W[known] = total
            known += 1
        count = 0
        while count < known - 1 and below_W[count] < below:
            count += 1
        count_C[i] = count


@njit(cache=True, nogil=True)
def draw_scenarios(mean_E, var_E, doubt, normal_CE, load_CE):  # type: ignore[no-untyped-def]
    """Loads that a forecast deems likely; returns how many rows of ``load_CE`` are filled.

    The spread is the forecast's own, but never less than counting noise or ``doubt`` of the mean: history states no
    more than counting noise, and is further off than that. A forecast without any variance is taken to be exact.
    """
    exact = True
    for e in range(len(mean_E)):
        exact = exact and var_E[e] == 0.0
    rows = min(1, len(normal_CE)) if exact else len(normal_CE)
    below_W = np.empty(MOST_FEW)
    for e in range(len(mean_E)):
        spread = 0.0
        if not exact:
            spread = np.sqrt(max(var_E[e], mean_E[e], (doubt * mean_E[e]) ** 2))
        if 0.0 < mean_E[e] <= FEW and spread > 0.0:
            few_tokens(mean_E[e], spread * spread, normal_CE[:rows, e], load_CE[:rows, e], below_W)
            continue
        for i in range(rows):
            load_CE[i, e] = np.int64(np.rint(max(mean_E[e] + spread * normal_CE[i, e], 0.0)))
    return rows


@njit(cache=True, nogil=True)
def static_totals(load_CE, gpu_E, a, b, time_CG, tokens_CG):  # type: ignore[no-untyped-def]
    """Static EP's seconds and tokens of each GPU under each scenario."""
    time_CG[:] = 0.0
    tokens_CG[:] = 0
    for i in range(load_CE.shape[0]):
        for e in range(load_CE.shape[1]):
            n = load_CE[i, e]
            if n > 0:
                time_CG[i, gpu_E[e]] += max(a * n, b)
                tokens_CG[i, gpu_E[e]] += n


@njit(cache=True, nogil=True)
def static_and_bound(load_CE, gpu_E, num_gpus, extra, a, b, c, bound_C):  # type: ignore[no-untyped-def]
    """Static EP's mean time over scenarios; into ``bound_C`` what each scenario adds to any plan's mean at least.

    As in ``bound.layer_bound``: splitting an expert never lowers its summed time, some GPU serves at least its share
    of the loaded experts, and an expert has at most ``extra + 1`` copies.
    """
    time_CG = np.empty((load_CE.shape[0], num_gpus))
    tokens_CG = np.empty((load_CE.shape[0], num_gpus), np.int64)
    static_totals(load_CE, gpu_E, a, b, time_CG, tokens_CG)
    return bound_of(load_CE, time_CG, tokens_CG, extra, a, b, c, bound_C)


@njit(cache=True, nogil=True)
def bound_of(load_CE, time_CG, tokens_CG, extra, a, b, c, bound_C):  # type: ignore[no-untyped-def]
    """:func:`static_and_bound` from static EP's totals."""
    num_scenarios, num_experts = load_CE.shape
    num_gpus = time_CG.shape[1]
    copies = min(num_gpus, extra + 1)
    static = 0.0
    for i in range(num_scenarios):
        loaded, largest = 0, 0
        for e in range(num_experts):
            n = load_CE[i, e]
            if n > 0:
                loaded += 1
                largest = max(largest, n)
        static += (time_CG[i].max() + c * tokens_CG[i].max()) / num_scenarios
        least = max(time_CG[i].sum() / num_gpus, ((loaded + num_gpus - 1) // num_gpus) * b)
        if largest > 0:
            least = max(least, a * ((largest + copies - 1) // copies))
        least += c * ((tokens_CG[i].sum() + num_gpus - 1) // num_gpus)
        bound_C[i] = least * (1 - SLACK) / num_scenarios
    return static


@njit(cache=True, nogil=True)
def _movable(load_E, expert_X, gpu_X, gpu_E, at_E, first_G, fill_G, state):  # type: ignore[no-untyped-def]
    """Fill ``state`` and ``first_G`` with the loaded experts that have extras; returns the number of copies.

    ``at_E`` is -1 everywhere, before and after.
    """
    tokens_M, gpu_M, next_M = state
    first_G[:] = 0
    copies = 0
    for x in range(len(expert_X)):
        e = expert_X[x]
        if load_E[e] == 0:
            continue
        if at_E[e] < 0:
            at_E[e] = 0
            first_G[gpu_E[e] + 1] += 1
            copies += 1
        first_G[gpu_X[x] + 1] += 1
        copies += 1
    for g in range(len(fill_G)):
        first_G[g + 1] += first_G[g]
        fill_G[g] = first_G[g]
    for x in range(len(expert_X)):
        e = expert_X[x]
        if load_E[e] > 0:
            at_E[e] = -1
    for x in range(len(expert_X)):
        e = expert_X[x]
        if load_E[e] == 0:
            continue
        if at_E[e] < 0:
            i = fill_G[gpu_E[e]]
            fill_G[gpu_E[e]] += 1
            at_E[e] = i
            tokens_M[i], gpu_M[i], next_M[i] = load_E[e], gpu_E[e], i
        i, home = fill_G[gpu_X[x]], at_E[e]
        fill_G[gpu_X[x]] += 1
        tokens_M[i], gpu_M[i], next_M[i] = 0, gpu_X[x], next_M[home]
        next_M[home] = i
    for x in range(len(expert_X)):
        at_E[expert_X[x]] = -1
    return copies


@njit(cache=True, nogil=True)
def mean_seconds(  # type: ignore[no-untyped-def]
    load_CE, time_CG, tokens_CG, rest_C, expert_X, gpu_X, gpu_E, a, b, c, depth, fuel, worst, pace_C, sum_C
):
    """Mean time over scenarios with these extras; infinite as soon as it is bound to exceed ``worst``.

    ``rest_C[i]`` is the least that scenarios i and after add; ``sum_C[i]`` gets what those up to i took. Infinite too
    where that is clearly more than ``pace_C[i]``, the best plan's so far, after the first pair of scenarios. A single
    scenario is an exact forecast: searched as the dispatch does.
    """
    num_scenarios, num_gpus = time_CG.shape
    at_E = np.full(load_CE.shape[1], -1, np.int64)
    first_G, fill_G = np.empty(num_gpus + 1, np.int64), np.empty(num_gpus, np.int64)
    most = 2 * len(expert_X)
    time_G, tokens_G = np.empty(num_gpus), np.empty(num_gpus, np.int64)
    whole, real = working_memory(most, num_gpus)
    whole_W, real_W = np.empty(2 * most + whole, np.int64), np.empty(real)
    state, whole_W = copies_in(whole_W, most), whole_W[2 * most :]
    total = 0.0
    for i in range(num_scenarios):
        if total + rest_C[i] > worst:
            return np.inf
        time_G[:], tokens_G[:] = time_CG[i], tokens_CG[i]
        copies = _movable(load_CE[i], expert_X, gpu_X, gpu_E, at_E, first_G, fill_G, state)
        loaded = Copies(state.tokens_M[:copies], state.gpu_M[:copies], state.next_M[:copies])
        reached = search(loaded, first_G, time_G, tokens_G, a, b, c, depth, fuel, num_scenarios == 1, whole_W, real_W)
        total += reached / num_scenarios
        sum_C[i] = total
        if i > 0 and total > CLEARLY * pace_C[i]:
            return np.inf
    return total
