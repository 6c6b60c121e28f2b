"""Compiled dispatch of one layer: from true counts to tokens of each source rank to each copy.

Axes: S source ranks (rank s is GPU s), E experts, R replicas in any order, G GPUs.
"""

from __future__ import annotations

import numpy as np

from moeless.costs.kernels import KernelTerms, quota_time
from moeless.jit import njit
from moeless.placement.chain_kernels import GPU, NEXT, TOKENS, balance
from moeless.placement.dispatch import _round_robin
from moeless.placement.path_kernels import shorten


@njit(cache=True, nogil=True)
def choose_copies(load_E, expert_R, gpu_R, primary_R, serving, num_gpus, a, b, c, depth, fuel, tokens_R):  # type: ignore[no-untyped-def]
    """Tokens of each copy, total over sources, into ``tokens_R``; returns static EP's time and the time reached.

    Times leave out launch and latency. Primaries that cannot serve hand everything to the first copy that can.
    """
    num_experts, num_replicas = len(load_E), len(expert_R)
    copies_E = np.zeros(num_experts, np.int64)
    start_E = np.full(num_experts, -1, np.int64)
    for r in range(num_replicas):
        tokens_R[r] = 0
        if serving[r]:
            e = expert_R[r]
            copies_E[e] += 1
            if start_E[e] < 0 or primary_R[r]:
                start_E[e] = r
    time_G, tokens_G = np.zeros(num_gpus), np.zeros(num_gpus, np.int64)
    first_G = np.zeros(num_gpus + 1, np.int64)
    movable = 0
    for r in range(num_replicas):
        e, g = expert_R[r], gpu_R[r]
        if not serving[r] or load_E[e] == 0:
            continue
        if start_E[e] == r:
            tokens_R[r] = load_E[e]
            time_G[g] += max(a * load_E[e], b)
            tokens_G[g] += load_E[e]
        if copies_E[e] > 1:
            first_G[g + 1] += 1
            movable += 1
    before = time_G.max() + c * tokens_G.max()
    if movable == 0:
        return before, before
    state = np.empty((3, movable), np.int64)
    back_M = np.empty(movable, np.int64)
    head_E, tail_E = np.full(num_experts, -1, np.int64), np.empty(num_experts, np.int64)
    for g in range(num_gpus):
        first_G[g + 1] += first_G[g]
    fill_G = first_G.copy()
    for r in range(num_replicas):
        e, g = expert_R[r], gpu_R[r]
        if serving[r] and load_E[e] > 0 and copies_E[e] > 1:
            i = fill_G[g]
            fill_G[g] += 1
            state[TOKENS, i], state[GPU, i], back_M[i] = tokens_R[r], g, r
            if head_E[e] < 0:
                head_E[e] = i
            else:
                state[NEXT, tail_E[e]] = i
            tail_E[e] = i
            state[NEXT, i] = head_E[e]
    after = shorten(state, first_G, time_G, tokens_G, a, b, c, depth, fuel)
    after = balance(state, first_G, time_G, tokens_G, a, b, c, depth - 1, fuel // 4)
    for i in range(movable):
        tokens_R[back_M[i]] = state[TOKENS, i]
    return before, after


@njit(cache=True, nogil=True)
def fill_sources(load_SE, tokens_R, expert_R, gpu_R, quota_SR):  # type: ignore[no-untyped-def]
    """Give each copy its tokens: those already on its GPU first, then source by source, lowest index first."""
    num_sources, num_replicas = load_SE.shape[0], len(expert_R)
    left_SE, left_R = load_SE.copy(), tokens_R.copy()
    quota_SR[:] = 0
    for r in range(num_replicas):
        if left_R[r] > 0 and gpu_R[r] < num_sources:
            s, e = gpu_R[r], expert_R[r]
            taken = min(left_SE[s, e], left_R[r])
            quota_SR[s, r] = taken
            left_SE[s, e] -= taken
            left_R[r] -= taken
    for r in range(num_replicas):
        e = expert_R[r]
        for s in range(num_sources):
            if left_R[r] == 0:
                break
            taken = min(left_SE[s, e], left_R[r])
            quota_SR[s, r] += taken
            left_SE[s, e] -= taken
            left_R[r] -= taken


@njit(cache=True, nogil=True)
def dispatch_layer(load_SE, expert_R, gpu_R, primary_R, serving, num_gpus, a, b, c, depth, fuel, quota_SR):  # type: ignore[no-untyped-def]
    """Copies and sources at once; returns whether the result is expected to beat static EP."""
    load_E = np.zeros(load_SE.shape[1], np.int64)
    for s in range(load_SE.shape[0]):
        for e in range(load_SE.shape[1]):
            load_E[e] += load_SE[s, e]
    tokens_R = np.empty(len(expert_R), np.int64)
    before, after = choose_copies(load_E, expert_R, gpu_R, primary_R, serving, num_gpus, a, b, c, depth, fuel, tokens_R)
    fill_sources(load_SE, tokens_R, expert_R, gpu_R, quota_SR)
    return after < before


@njit(cache=True, nogil=True)
def static_quotas(load_SE, expert_R, primary_R, serving, quota_SR):  # type: ignore[no-untyped-def]
    """Everything to the primaries, or to the first serving copy of an expert whose primary cannot serve."""
    num_sources, num_experts = load_SE.shape
    home_E = np.full(num_experts, -1, np.int64)
    quota_SR[:] = 0
    for r in range(len(expert_R)):
        if serving[r] and (home_E[expert_R[r]] < 0 or primary_R[r]):
            home_E[expert_R[r]] = r
    for s in range(num_sources):
        for e in range(num_experts):
            if home_E[e] >= 0:
                quota_SR[s, home_E[e]] = load_SE[s, e]


@njit(cache=True, nogil=True)
def expected_seconds(load_CE, expert_R, gpu_R, num_gpus, a, b, c, depth, fuel):  # type: ignore[no-untyped-def]
    """Mean time of a plan after dispatch over scenarios, with static EP's; the first E replicas are primaries."""
    num_scenarios, num_experts = load_CE.shape
    num_replicas = len(expert_R)
    primary_R, serving = np.zeros(num_replicas, np.bool_), np.ones(num_replicas, np.bool_)
    primary_R[:num_experts] = True
    tokens_R = np.empty(num_replicas, np.int64)
    static, dispatched = 0.0, 0.0
    for i in range(num_scenarios):
        before, after = choose_copies(
            load_CE[i], expert_R, gpu_R, primary_R, serving, num_gpus, a, b, c, depth, fuel, tokens_R
        )
        static += before / num_scenarios
        dispatched += after / num_scenarios
    return static, dispatched


@njit(cache=True, nogil=True)
def _serving(expert_R, primary_R, usable_R, num_experts):  # type: ignore[no-untyped-def]
    """As ``dispatch.serving_R``: usable copies, and primaries of experts that have none."""
    serving_R, alive_E = usable_R.copy(), np.zeros(num_experts, np.bool_)
    for r in range(len(expert_R)):
        if usable_R[r]:
            alive_E[expert_R[r]] = True
    for r in range(len(expert_R)):
        if primary_R[r] and not alive_E[expert_R[r]]:
            serving_R[r] = True
    return serving_R


@njit(cache=True, nogil=True)
def best_quotas(  # type: ignore[no-untyped-def]
    load_SE, expert_R, gpu_R, primary_R, usable_R, num_gpus, numbers_K, depth, fuel, load_G, quota_SR
):
    """The whole dispatch of one layer: static quotas, chosen ones, even ones where they can be best; the fastest wins.

    ``numbers_K`` are the search's rates a, b, c and then the fields of ``KernelTerms``; ``load_G`` gets the tokens of
    each GPU. Returns expert and exchange seconds.
    """
    num_experts = load_SE.shape[1]
    terms = KernelTerms(
        numbers_K[3], numbers_K[4], numbers_K[5], numbers_K[6] > 0, numbers_K[7], numbers_K[8] > 0,
        int(numbers_K[9]), numbers_K[10], numbers_K[11], numbers_K[12], numbers_K[13],
    )  # fmt: skip
    serving_R = _serving(expert_R, primary_R, usable_R, num_experts)
    static_quotas(load_SE, expert_R, primary_R, serving_R, quota_SR)
    expert, exchange = quota_time(quota_SR, gpu_R, terms, num_gpus, load_G)
    if len(expert_R) == num_experts:
        return expert, exchange
    other_SR, other_G = np.empty_like(quota_SR), np.empty(num_gpus)
    better = dispatch_layer(
        load_SE, expert_R, gpu_R, primary_R, serving_R, num_gpus, numbers_K[0], numbers_K[1], numbers_K[2], depth, fuel,
        other_SR,
    )  # fmt: skip
    for again in range(2):
        if again == 1:
            if not terms.reduce_max:
                break
            other_SR[:] = 0
            _round_robin(load_SE, expert_R, serving_R, other_SR)
        elif not better:
            continue
        other_expert, other_exchange = quota_time(other_SR, gpu_R, terms, num_gpus, other_G)
        if other_expert + other_exchange < expert + exchange:
            expert, exchange = other_expert, other_exchange
            quota_SR[:], load_G[:] = other_SR, other_G
    return expert, exchange
