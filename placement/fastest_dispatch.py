"""Compiled dispatch by true counts: of static EP, a search over the copies, and equal shares, the fastest.

Axes: C scenarios, E experts, R replicas, G GPUs, M movable copies sorted by GPU.
"""

from __future__ import annotations

import numpy as np

from moeless.jit import njit
from moeless.placement.dealing import (
    LayerCopies,
    copy_rows,
    deal_by_shares,
    deal_evenly,
    deal_to_homes,
    deal_totals,
    dealt_seconds,
    room_for_load,
    room_for_rows,
    room_for_traffic,
    rows_at_most,
    sort_copies,
    take_table,
)
from moeless.placement.dispatch_search import GpuLoad, MovableCopies, Rates, search, search_memory

#: A rule's numbers: seconds per token, weight read and exchange per token as the search takes them, and its bounds.
A, B, C, DEPTH, FUEL = 0, 1, 2, 3, 4


@njit(cache=True, nogil=True)
def choose_copies(load_E, expert_R, gpu_R, primary_R, serving, num_gpus, a, b, c, depth, fuel, tokens_R):  # type: ignore[no-untyped-def]
    """Tokens of each copy, total over sources, into ``tokens_R``; returns static EP's time and the time reached.

    Times leave out launch and latency. Primaries that cannot serve hand everything to the first copy that can.
    """
    num_experts, num_replicas = len(load_E), len(expert_R)
    copies_E, start_E = np.zeros(num_experts, np.int64), np.full(num_experts, -1, np.int64)
    head_E, tail_E = np.full(num_experts, -1, np.int64), np.empty(num_experts, np.int64)
    tokens_G, first_G = np.zeros(num_gpus, np.int64), np.zeros(num_gpus + 1, np.int64)
    time_G = np.zeros(num_gpus)
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
    slowest, most = 0.0, 0
    for g in range(num_gpus):
        slowest, most = max(slowest, time_G[g]), max(most, tokens_G[g])
    before = slowest + c * most
    if movable == 0:
        return before, before
    tokens_M = np.empty(movable, np.int64)
    gpu_M, next_M = np.empty(movable, np.uint32), np.empty(movable, np.uint32)
    back_M, fill_G = np.empty(movable, np.int64), np.empty(num_gpus, np.int64)
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
    load, memory = GpuLoad(time_G, tokens_G), search_memory(movable, num_gpus)
    after = search(MovableCopies(tokens_M, gpu_M, next_M, first_G), load, Rates(a, b, c), depth, fuel, thorough, memory)
    for i in range(movable):
        tokens_R[back_M[i]] = tokens_M[i]
    return before, after


@njit(cache=True, nogil=True)
def deal_fastest(load, copies, numbers, costs, dealt):  # type: ignore[no-untyped-def]
    """Static EP's rows, those of :func:`choose_copies`, or equal ones where these can be best; ties to the first.

    Static EP is among the choices, so that under the cost model the result is never slower. Returns the number of rows.
    """
    rows = deal_to_homes(load, copies, dealt)
    first_E, choice = copies.first_E, False
    for e in range(len(first_E) - 1):
        choice = choice or first_E[e + 1] - first_E[e] > 1
    if not choice:
        return rows
    traffic = room_for_traffic(len(copies.expert_R), copies.num_gpus)
    total_R = np.empty(len(copies.expert_R), np.int64)
    before, after = choose_copies(
        load.tokens_E, copies.expert_R, copies.gpu_R, copies.primary_R, copies.serving_R, copies.num_gpus, numbers[A],
        numbers[B], numbers[C], int(numbers[DEPTH]), int(numbers[FUEL]), total_R,
    )  # fmt: skip
    if after >= before and not costs.reduce_max:
        return rows
    least = dealt_seconds(dealt, rows, copies, costs, traffic)
    other = room_for_rows(len(dealt.source_X))
    for way in range(2):
        if way == 0:
            if after >= before:
                continue
            count = deal_totals(load, copies, total_R, other)
        elif costs.reduce_max:
            count = deal_evenly(load, copies, numbers, costs, other)
        else:
            continue
        seconds = dealt_seconds(other, count, copies, costs, traffic)
        if seconds < least:
            least, rows = seconds, count
            copy_rows(other, count, dealt)
    return rows


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
def spread_evenly(load_E, load_SE):  # type: ignore[no-untyped-def]
    """Each expert's tokens as if every source rank had sent the same number; the rest goes round."""
    sources, start = load_SE.shape[0], 0
    for e in range(len(load_E)):
        base, rest = load_E[e] // sources, load_E[e] % sources
        for s in range(sources):
            # a running start keeps the ranks' totals even too
            load_SE[s, e] = base + ((s - start) % sources < rest)
        start = (start + rest) % sources


@njit(cache=True, nogil=True, inner=True)
def seconds_saved(load_CE, expert_R, gpu_R, primary_R, share_R, num_gpus, numbers, costs):  # type: ignore[no-untyped-def]
    """Mean seconds by which a plan beats its primaries alone over scenarios, as the cost model itself sees it.

    Args:
        share_R: the plan's fixed shares; none: :func:`deal_fastest` deals.
    """
    scenarios, experts = load_CE.shape
    load_SE, load = np.empty((num_gpus, experts), np.int64), room_for_load(experts, num_gpus * experts)
    serving_R = np.ones(len(expert_R), np.bool_)
    first_E, home_E = np.empty(experts + 1, np.int64), np.empty(experts, np.int64)
    by_expert_R = np.empty(len(expert_R), np.int64)
    sort_copies(expert_R, primary_R, serving_R, first_E, by_expert_R, home_E)
    copies = LayerCopies(expert_R, gpu_R, primary_R, serving_R, first_E, by_expert_R, home_E, num_gpus)
    traffic, saved = room_for_traffic(len(expert_R), num_gpus), 0.0
    for i in range(scenarios):
        spread_evenly(load_CE[i], load_SE)
        take_table(load_SE, load)
        dealt = room_for_rows(rows_at_most(load, copies))
        saved += dealt_seconds(dealt, deal_to_homes(load, copies, dealt), copies, costs, traffic)
        if len(share_R) > 0:
            rows = deal_by_shares(load, copies, share_R, dealt)
        else:
            rows = deal_fastest(load, copies, numbers, costs, dealt)
        saved -= dealt_seconds(dealt, rows, copies, costs, traffic)
    return saved / scenarios
