"""Compiled choice among placements of one layer: grow by every rule, score on scenarios, drop the last extras.

Axes: C scenarios, E experts, R replicas in order of decision (primaries first), G GPUs, W weights to grow by.
"""

from __future__ import annotations

import numpy as np

from moeless.jit import njit
from moeless.placement.dispatch_kernels import choose_copies
from moeless.placement.grow_kernels import grow

#: Rounding that a bound must leave to the times it is compared with.
SLACK = 1e-9


@njit(cache=True, nogil=True)
def static_and_bound(load_CE, gpu_E, num_gpus, extra, a, b, c, bound_C):  # type: ignore[no-untyped-def]
    """Static EP's mean time over scenarios; into ``bound_C`` what each scenario adds to any plan's mean at least.

    As in ``bound.layer_bound``: splitting an expert never lowers its summed time, some GPU serves at least its share
    of the loaded experts, and an expert has at most ``extra + 1`` copies.
    """
    num_scenarios, num_experts = load_CE.shape
    copies = min(num_gpus, extra + 1)
    time_G, tokens_G = np.empty(num_gpus), np.empty(num_gpus, np.int64)
    static = 0.0
    for i in range(num_scenarios):
        time_G[:] = 0.0
        tokens_G[:] = 0
        loaded, largest = 0, 0
        for e in range(num_experts):
            n = load_CE[i, e]
            if n > 0:
                time_G[gpu_E[e]] += max(a * n, b)
                tokens_G[gpu_E[e]] += n
                loaded += 1
                largest = max(largest, n)
        static += (time_G.max() + c * tokens_G.max()) / num_scenarios
        least = max(time_G.sum() / num_gpus, ((loaded + num_gpus - 1) // num_gpus) * b)
        if largest > 0:
            least = max(least, a * ((largest + copies - 1) // copies))
        least += c * ((tokens_G.sum() + num_gpus - 1) // num_gpus)
        bound_C[i] = least * (1 - SLACK) / num_scenarios
    return static


@njit(cache=True, nogil=True)
def _mean_seconds(load_CE, rest_C, expert_R, gpu_R, marks, num_gpus, a, b, c, depth, fuel, worst):  # type: ignore[no-untyped-def]
    """Mean time of a plan over scenarios; infinite as soon as it is bound to exceed ``worst``.

    ``rest_C[i]`` is the least that scenarios i and after add; ``marks`` are the rows (primary, serving).
    """
    num_scenarios, count = load_CE.shape[0], len(expert_R)
    tokens_R = np.empty(count, np.int64)
    total = 0.0
    for i in range(num_scenarios):
        if total + rest_C[i] > worst:
            return np.inf
        total += (
            choose_copies(
                load_CE[i],
                expert_R,
                gpu_R,
                marks[0, :count],
                marks[1, :count],
                num_gpus,
                a,
                b,
                c,
                depth,
                fuel,
                tokens_R,
            )[1]
            / num_scenarios
        )
    return total


@njit(cache=True, nogil=True)
def choose_extras(  # type: ignore[no-untyped-def]
    load_CE, bound_C, weight_WE, gpu_E, room_G, extra, a, b, c, depth, fuel, plain, economy, expert_R, gpu_R
):
    """The fewest extras whose time is within ``economy`` of the best rule's; returns replicas and their mean time.

    Fills ``expert_R`` and ``gpu_R``. ``plain`` and ``bound_C`` are :func:`static_and_bound`'s. Ties: the first rule.
    """
    num_scenarios, num_experts = load_CE.shape
    num_gpus, tried = len(room_G), 3 * len(weight_WE)
    rest_C = bound_C.copy()
    for i in range(num_scenarios - 2, -1, -1):
        rest_C[i] += rest_C[i + 1]
    marks = np.ones((2, num_experts + extra), np.bool_)
    marks[0, num_experts:] = False
    expert_XR = np.empty((tried, num_experts + extra), np.int32)
    gpu_XR = np.empty((tried, num_experts + extra), np.int32)
    count_X = np.empty(tried, np.int64)
    best, least = 0, np.inf
    for x in range(tried):
        # the rules are 0, 1, 2; weights come one after the other
        count_X[x] = grow(weight_WE[x // 3], gpu_E, room_G, extra, x % 3, expert_XR[x], gpu_XR[x])
        again = False
        for y in range(x):
            if count_X[y] == count_X[x]:
                again = True
                for r in range(count_X[x]):
                    if expert_XR[x, r] != expert_XR[y, r] or gpu_XR[x, r] != gpu_XR[y, r]:
                        again = False
                        break
                if again:
                    break
        if again:
            continue
        score = _mean_seconds(
            load_CE, rest_C, expert_XR[x, : count_X[x]], gpu_XR[x, : count_X[x]], marks, num_gpus, a, b, c, depth, fuel,
            least,
        )  # fmt: skip
        if score < least:
            best, least = x, score
    expert_R[: count_X[best]] = expert_XR[best, : count_X[best]]
    gpu_R[: count_X[best]] = gpu_XR[best, : count_X[best]]
    # copies are in order of worth: leave out the last ones as long as little is lost
    low, high, reached, enough = num_experts, count_X[best], least, least * (1 + economy)
    while low < high:
        middle = (low + high) // 2
        if middle == num_experts:
            score = plain
        else:
            score = _mean_seconds(
                load_CE, rest_C, expert_R[:middle], gpu_R[:middle], marks, num_gpus, a, b, c, depth, fuel, enough
            )
        if score <= enough:
            high, reached = middle, score
        else:
            low = middle + 1
    return high, reached
