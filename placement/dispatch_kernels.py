"""Compiled dispatch of one layer: from true counts to tokens of each source rank to each copy.

Nothing is allocated on the way where ``whole_W`` and ``real_W`` are handed in: whole and real numbers to work with, as
many as :func:`working_memory` says, whatever they hold.
Axes: S source ranks (rank s is GPU s), E experts, R replicas in any order, G GPUs, W working memory.
"""

from __future__ import annotations

import numpy as np

from moeless.costs.kernels import KernelTerms, quota_time_with
from moeless.jit import njit
from moeless.placement.dispatch import _round_robin
from moeless.placement.dispatch_search import GpuLoad, MovableCopies, Rates, search, search_memory


@njit(cache=True, nogil=True)
def working_memory(sources, experts, replicas, gpus):  # type: ignore[no-untyped-def]
    """Whole and real numbers that any function of this module needs."""
    return sources * (experts + replicas) + 6 * experts + 9 * replicas + 11 * gpus + 8, 12 * gpus


@njit(cache=True, nogil=True)
def choose_copies(load_E, expert_R, gpu_R, primary_R, serving, num_gpus, a, b, c, depth, fuel, tokens_R):  # type: ignore[no-untyped-def]
    """Tokens of each copy, total over sources, into ``tokens_R``; returns static EP's time and the time reached.

    Times leave out launch and latency. Primaries that cannot serve hand everything to the first copy that can.
    """
    whole, real = working_memory(0, len(load_E), len(expert_R), num_gpus)
    return _choose_copies(
        load_E, expert_R, gpu_R, primary_R, serving, num_gpus, a, b, c, depth, fuel, tokens_R,
        np.empty(whole, np.int64), np.empty(real),
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _choose_copies(  # type: ignore[no-untyped-def]
    load_E, expert_R, gpu_R, primary_R, serving, num_gpus, a, b, c, depth, fuel, tokens_R, whole_W, real_W
):
    """:func:`choose_copies` in given memory."""
    num_experts, num_replicas = len(load_E), len(expert_R)
    copies_E, start_E = whole_W[:num_experts], whole_W[num_experts : 2 * num_experts]
    head_E, tail_E = whole_W[2 * num_experts : 3 * num_experts], whole_W[3 * num_experts : 4 * num_experts]
    whole_W = whole_W[4 * num_experts :]
    tokens_G, first_G = whole_W[:num_gpus], whole_W[num_gpus : 2 * num_gpus + 1]
    fill_G, whole_W = whole_W[2 * num_gpus + 1 : 3 * num_gpus + 1], whole_W[3 * num_gpus + 1 :]
    back_M, whole_W = whole_W[:num_replicas], whole_W[num_replicas:]
    time_G = real_W[:num_gpus]
    for e in range(num_experts):
        copies_E[e], start_E[e], head_E[e] = 0, -1, -1
    for g in range(num_gpus):
        tokens_G[g], first_G[g + 1], time_G[g] = 0, 0, 0.0
    first_G[0] = 0
    for r in range(num_replicas):
        tokens_R[r] = 0
        if serving[r]:
            e = expert_R[r]
            copies_E[e] += 1
            if start_E[e] < 0 or primary_R[r]:
                start_E[e] = r
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
    tokens_M, at_2M = whole_W[:movable], whole_W[movable : 2 * movable].view(np.uint32)
    gpu_M, next_M = at_2M[:movable], at_2M[movable:]
    for g in range(num_gpus):
        fill_G[g] = first_G[g]
        first_G[g + 1] += first_G[g]
    for r in range(num_replicas):
        e, g = expert_R[r], gpu_R[r]
        if serving[r] and load_E[e] > 0 and copies_E[e] > 1:
            i = fill_G[g]
            fill_G[g] += 1
            tokens_M[i], gpu_M[i], back_M[i] = tokens_R[r], g, r
            if head_E[e] < 0:
                head_E[e] = i
            else:
                next_M[tail_E[e]] = i
            tail_E[e] = i
            next_M[i] = head_E[e]
    # as a constant it would be compiled into a second search
    thorough = np.bool_(True)
    movable_copies = MovableCopies(tokens_M, gpu_M, next_M, first_G)
    memory = search_memory(movable, num_gpus)
    after = search(movable_copies, GpuLoad(time_G, tokens_G), Rates(a, b, c), depth, fuel, thorough, memory)
    for i in range(movable):
        tokens_R[back_M[i]] = tokens_M[i]
    return before, after


@njit(cache=True, nogil=True)
def fill_sources(load_SE, tokens_R, expert_R, gpu_R, quota_SR):  # type: ignore[no-untyped-def]
    """Give each copy its tokens: those already on its GPU first, then source by source, lowest index first."""
    _fill_sources(load_SE, tokens_R, expert_R, gpu_R, quota_SR, np.empty(load_SE.size + len(tokens_R), np.int64))


@njit(cache=True, nogil=True)
def _fill_sources(load_SE, tokens_R, expert_R, gpu_R, quota_SR, whole_W):  # type: ignore[no-untyped-def]
    """:func:`fill_sources` in given memory."""
    num_sources, num_replicas = load_SE.shape[0], len(expert_R)
    left_SE, left_R = whole_W[: load_SE.size].reshape(load_SE.shape), whole_W[load_SE.size :]
    for s in range(num_sources):
        for e in range(load_SE.shape[1]):
            left_SE[s, e] = load_SE[s, e]
        for r in range(num_replicas):
            quota_SR[s, r] = 0
    for r in range(num_replicas):
        left_R[r] = tokens_R[r]
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
def dispatch_layer(  # type: ignore[no-untyped-def]
    load_SE, expert_R, gpu_R, primary_R, serving, num_gpus, a, b, c, depth, fuel, quota_SR, whole_W, real_W
):
    """Copies and sources at once; returns whether the result is expected to beat static EP."""
    num_experts, num_replicas = load_SE.shape[1], len(expert_R)
    load_E, tokens_R = whole_W[:num_experts], whole_W[num_experts : num_experts + num_replicas]
    whole_W = whole_W[num_experts + num_replicas :]
    for e in range(num_experts):
        load_E[e] = load_SE[0, e]
    for s in range(1, load_SE.shape[0]):
        for e in range(num_experts):
            load_E[e] += load_SE[s, e]
    before, after = _choose_copies(
        load_E, expert_R, gpu_R, primary_R, serving, num_gpus, a, b, c, depth, fuel, tokens_R, whole_W, real_W
    )
    if after >= before:
        return False
    _fill_sources(load_SE, tokens_R, expert_R, gpu_R, quota_SR, whole_W)
    return True


@njit(cache=True, nogil=True)
def static_quotas(load_SE, expert_R, primary_R, serving, quota_SR):  # type: ignore[no-untyped-def]
    """Everything to the primaries, or to the first serving copy of an expert whose primary cannot serve."""
    _static_quotas(load_SE, expert_R, primary_R, serving, quota_SR, np.empty(load_SE.shape[1], np.int64))


@njit(cache=True, nogil=True)
def _static_quotas(load_SE, expert_R, primary_R, serving, quota_SR, whole_W):  # type: ignore[no-untyped-def]
    """:func:`static_quotas` in given memory."""
    num_sources, num_experts = load_SE.shape
    home_E = whole_W[:num_experts]
    for e in range(num_experts):
        home_E[e] = -1
    for r in range(len(expert_R)):
        if serving[r] and (home_E[expert_R[r]] < 0 or primary_R[r]):
            home_E[expert_R[r]] = r
    for s in range(num_sources):
        for r in range(len(expert_R)):
            quota_SR[s, r] = 0
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
def best_quotas(  # type: ignore[no-untyped-def]
    load_SE, expert_R, gpu_R, primary_R, usable_R, numbers_K, depth, fuel, quota_SR, whole_W, real_W
):
    """The whole dispatch of one layer into ``quota_SR``: the fastest of the choices of :func:`fastest_quotas`.

    ``numbers_K`` are the number of GPUs, the search's rates a, b, c and then the fields of ``KernelTerms``. A copy
    serves that is usable, and the primary of an expert that has none.
    """
    num_experts, num_replicas, num_gpus = load_SE.shape[1], len(expert_R), int(numbers_K[0])
    terms = KernelTerms(
        numbers_K[4], numbers_K[5], numbers_K[6], numbers_K[7] > 0, numbers_K[8], numbers_K[9] > 0,
        int(numbers_K[10]), numbers_K[11], numbers_K[12], numbers_K[13], numbers_K[14],
    )  # fmt: skip
    serving_R, alive_E = whole_W[:num_replicas], whole_W[num_replicas : num_replicas + num_experts]
    for e in range(num_experts):
        alive_E[e] = 0
    for r in range(num_replicas):
        serving_R[r] = usable_R[r]
        if usable_R[r]:
            alive_E[expert_R[r]] = 1
    for r in range(num_replicas):
        if primary_R[r] and not alive_E[expert_R[r]]:
            serving_R[r] = 1
    return fastest_quotas(
        load_SE, expert_R, gpu_R, primary_R, serving_R, num_gpus, numbers_K[1], numbers_K[2], numbers_K[3], terms,
        depth, fuel, real_W[:num_gpus], quota_SR, whole_W[num_replicas:], real_W[num_gpus:],
    )  # fmt: skip


@njit(cache=True, nogil=True)
def fastest_quotas(  # type: ignore[no-untyped-def]
    load_SE, expert_R, gpu_R, primary_R, serving_R, num_gpus, a, b, c, terms, depth, fuel, load_G, quota_SR,
    whole_W, real_W,
):  # fmt: skip
    """Static quotas, chosen ones, even ones where they can be best; the fastest wins, ties to the first.

    Fills ``quota_SR`` and the tokens of each GPU, ``load_G``; returns expert and exchange seconds under ``terms``.
    """
    num_experts, num_replicas = load_SE.shape[1], len(expert_R)
    _static_quotas(load_SE, expert_R, primary_R, serving_R, quota_SR, whole_W)
    other_G, scratch_5G = real_W[:num_gpus], real_W[num_gpus : 6 * num_gpus].reshape(5, num_gpus)
    expert, exchange = quota_time_with(quota_SR, gpu_R, terms, num_gpus, load_G, scratch_5G)
    if num_replicas == num_experts:
        return expert, exchange
    other_SR = whole_W[: quota_SR.size].reshape(quota_SR.shape)
    better = dispatch_layer(
        load_SE, expert_R, gpu_R, primary_R, serving_R, num_gpus, a, b, c, depth, fuel, other_SR,
        whole_W[quota_SR.size :], real_W[6 * num_gpus :],
    )  # fmt: skip
    for again in range(2):
        if again == 1:
            if not terms.reduce_max:
                break
            other_SR[:] = 0
            _round_robin(load_SE, expert_R, serving_R, other_SR)
        elif not better:
            continue
        other_expert, other_exchange = quota_time_with(other_SR, gpu_R, terms, num_gpus, other_G, scratch_5G)
        if other_expert + other_exchange < expert + exchange:
            expert, exchange = other_expert, other_exchange
            for s in range(quota_SR.shape[0]):
                for r in range(num_replicas):
                    quota_SR[s, r] = other_SR[s, r]
            for g in range(num_gpus):
                load_G[g] = other_G[g]
    return expert, exchange
