"""Compiled time of one layer, without a table of source ranks by copies.

What a layer takes depends on the tokens of each copy and on who sends and receives how many; which source's tokens go
to which copy is followed expert by expert, over the sources that have any. On a thousand GPUs nearly all of the table
would be zeros. Equal to the planner's own dispatch with ``quota_time``, to the last bit: sums of tokens are exact, and
times are added in the same order.

Axes: S source ranks (rank s is GPU s), E experts, K experts per token, T tokens in order of their ranks, R replicas in
a plan's order, G GPUs, N runs of tokens of one source for one expert, expert by expert, Q the quantities of
``SENT_FAST`` ... ``LOAD``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeless.contracts import FloatArray, IntArray
from moeless.costs.kernels import exchange_time
from moeless.jit import njit
from moeless.placement.dispatch_kernels import _choose_copies, working_memory

#: How tokens are dealt to copies: equal shares, or the elastic planner's choice from the true counts.
EVEN, CHOSEN = 0, 1
#: Tokens of each GPU by direction and link tier, and all that it computes.
SENT_FAST, SENT_SLOW, GOT_FAST, GOT_SLOW, LOAD = 0, 1, 2, 3, 4


class Memory(NamedTuple):
    """What one layer's timing works in, and its loads: ``first_E`` .. ``last_E`` are an expert's runs of tokens.

    Afterwards ``sums_QG[LOAD]`` holds the tokens of each GPU. Made by :func:`memory`, filled by :func:`load_table` or
    :func:`load_tokens`.
    """

    island_G: IntArray
    table_SE: IntArray
    load_E: IntArray
    first_E: IntArray
    last_E: IntArray
    fill_E: IntArray
    source_N: IntArray
    count_N: IntArray
    home_E: IntArray
    copies_E: IntArray
    copy_R: IntArray
    offset_E: IntArray
    tokens_R: IntArray
    other_R: IntArray
    sums_QG: FloatArray
    other_QG: FloatArray
    seconds_G: FloatArray
    whole_W: IntArray
    real_W: FloatArray


@njit(cache=True, nogil=True)
def memory(sources, experts, replicas, gpus, island_size, tokens):  # type: ignore[no-untyped-def]
    """Enough for any layer of up to so many replicas and so many tokens, each expert of a token counted."""
    # the choice of copies alone needs no room for sources
    whole, real = working_memory(0, experts, replicas, gpus)
    # a table where it is smaller than the tokens are many
    rows = sources if sources * experts <= tokens else 0
    runs = min(sources * experts, tokens)
    return Memory(
        np.arange(gpus) // island_size, np.empty((rows, experts), np.int64), np.empty(experts, np.int64),
        np.empty(experts, np.int64), np.empty(experts, np.int64), np.empty(experts, np.int64),
        np.empty(runs, np.int64), np.empty(runs, np.int64), np.empty(experts, np.int64), np.empty(experts, np.int64),
        np.empty(replicas, np.int64), np.empty(experts + 1, np.int64), np.empty(replicas, np.int64),
        np.empty(replicas, np.int64), np.empty((5, gpus)), np.empty((5, gpus)), np.empty(gpus),
        np.empty(whole, np.int64), np.empty(real),
    )  # fmt: skip


@njit(cache=True, nogil=True)
def load_table(load_SE, m):  # type: ignore[no-untyped-def]
    """Take a layer's loads from a table of source ranks by experts."""
    sources, experts = load_SE.shape
    for e in range(experts):
        m.load_E[e], m.fill_E[e] = 0, 0
    for s in range(sources):
        for e in range(experts):
            n = load_SE[s, e]
            m.load_E[e] += n
            m.fill_E[e] += n > 0
    at = 0
    for e in range(experts):
        m.first_E[e], m.last_E[e] = at, at
        at += m.fill_E[e]
    for s in range(sources):
        for e in range(experts):
            n = load_SE[s, e]
            if n > 0:
                i = m.last_E[e]
                m.source_N[i], m.count_N[i] = s, n
                m.last_E[e] += 1


@njit(cache=True, nogil=True)
def load_tokens(topk_TLK, row_T, rank_T, layer, m):  # type: ignore[no-untyped-def]
    """Take a layer's loads from its tokens' experts: rows of ``topk_TLK`` and source ranks, the ranks ascending."""
    top, experts, tokens = topk_TLK.shape[2], len(m.load_E), len(row_T)
    if len(m.table_SE) > 0:
        m.table_SE[:] = 0
        for t in range(tokens):
            row, s = row_T[t], rank_T[t]
            for k in range(top):
                m.table_SE[s, topk_TLK[row, layer, k]] += 1
        load_table(m.table_SE, m)
        return
    for e in range(experts):
        m.load_E[e] = 0
    for t in range(tokens):
        row = row_T[t]
        for k in range(top):
            m.load_E[topk_TLK[row, layer, k]] += 1
    at = 0
    for e in range(experts):
        m.first_E[e], m.last_E[e] = at, at
        at += m.load_E[e]
    for t in range(tokens):
        row, s = row_T[t], rank_T[t]
        for k in range(top):
            e = topk_TLK[row, layer, k]
            i = m.last_E[e]
            if i > m.first_E[e] and m.source_N[i - 1] == s:
                m.count_N[i - 1] += 1
            else:
                m.source_N[i], m.count_N[i] = s, 1
                m.last_E[e] = i + 1


@njit(cache=True, nogil=True)
def _sort_copies(expert_R, primary_R, serving_R, m):  # type: ignore[no-untyped-def]
    """Serving copies of each expert, ascending, into ``copy_R`` by ``offset_E``; the one that takes all by itself."""
    experts = len(m.load_E)
    for e in range(experts):
        m.copies_E[e], m.home_E[e] = 0, -1
    for r in range(len(expert_R)):
        if serving_R[r]:
            e = expert_R[r]
            m.copies_E[e] += 1
            if m.home_E[e] < 0 or primary_R[r]:
                m.home_E[e] = r
    m.offset_E[0] = 0
    for e in range(experts):
        m.offset_E[e + 1] = m.offset_E[e] + m.copies_E[e]
        m.fill_E[e] = m.offset_E[e]
    for r in range(len(expert_R)):
        if serving_R[r]:
            e = expert_R[r]
            m.copy_R[m.fill_E[e]] = r
            m.fill_E[e] += 1


@njit(cache=True, nogil=True, inline="always")
def _send(s, g, n, island_G, sums_QG):  # type: ignore[no-untyped-def]
    if s != g:
        tier = 0 if island_G[s] == island_G[g] else 1
        sums_QG[SENT_FAST + tier, s] += n
        sums_QG[GOT_FAST + tier, g] += n


@njit(cache=True, nogil=True)
def _all_to_one(e, r, gpu_R, m, tokens_R, sums_QG):  # type: ignore[no-untyped-def]
    """All tokens of an expert to one copy."""
    tokens_R[r] = m.load_E[e]
    for i in range(m.first_E[e], m.last_E[e]):
        _send(m.source_N[i], gpu_R[r], m.count_N[i], m.island_G, sums_QG)


@njit(cache=True, nogil=True)
def _fill(e, gpu_R, m, tokens_R, sums_QG):  # type: ignore[no-untyped-def]
    """As ``dispatch_kernels.fill_sources``: a copy's own GPU first, then source by source; uses up ``count_N``."""
    first, last = m.first_E[e], m.last_E[e]
    left_R = m.other_R
    for j in range(m.offset_E[e], m.offset_E[e + 1]):
        r = m.copy_R[j]
        left_R[r] = tokens_R[r]
        if left_R[r] > 0:
            low, high, g = first, last, gpu_R[r]
            while low < high:
                middle = (low + high) // 2
                if m.source_N[middle] < g:
                    low = middle + 1
                else:
                    high = middle
            if low < last and m.source_N[low] == g:
                taken = min(m.count_N[low], left_R[r])
                m.count_N[low] -= taken
                left_R[r] -= taken
    i = first
    for j in range(m.offset_E[e], m.offset_E[e + 1]):
        r = m.copy_R[j]
        while left_R[r] > 0 and i < last:
            taken = min(m.count_N[i], left_R[r])
            _send(m.source_N[i], gpu_R[r], taken, m.island_G, sums_QG)
            m.count_N[i] -= taken
            left_R[r] -= taken
            if m.count_N[i] == 0:
                i += 1


@njit(cache=True, nogil=True)
def _in_turn(e, gpu_R, m, tokens_R, sums_QG):  # type: ignore[no-untyped-def]
    """As ``dispatch.even_dispatch``: the tokens, source by source, to the copies in turn."""
    before, k = 0, m.copies_E[e]
    for i in range(m.first_E[e], m.last_E[e]):
        n = m.count_N[i]
        for j in range(k):
            first = (j - before) % k
            if n > first:
                r = m.copy_R[m.offset_E[e] + j]
                share = (n - first + k - 1) // k
                tokens_R[r] += share
                _send(m.source_N[i], gpu_R[r], share, m.island_G, sums_QG)
        before += n


@njit(cache=True, nogil=True)
def _seconds(gpu_R, terms, num_gpus, tokens_R, sums_QG, seconds_G):  # type: ignore[no-untyped-def]
    """Expert and exchange seconds, and copies with tokens; fills ``sums_QG[LOAD]``."""
    active = 0
    for g in range(num_gpus):
        seconds_G[g] = 0.0
    for r in range(len(gpu_R)):
        n = tokens_R[r]
        if n > 0:
            active += 1
            g = gpu_R[r]
            sums_QG[LOAD, g] += n
            time = max(n * terms.token_seconds, terms.floor_seconds)
            if terms.reduce_max:
                seconds_G[g] = max(seconds_G[g], time)
            else:
                seconds_G[g] += time
    worst = 0.0
    for g in range(num_gpus):
        if seconds_G[g] > 0.0:
            worst = max(worst, seconds_G[g] + terms.launch_seconds)
    exchange = exchange_time(
        sums_QG[SENT_FAST], sums_QG[SENT_SLOW], sums_QG[GOT_FAST], sums_QG[GOT_SLOW], sums_QG[LOAD], terms, num_gpus
    )
    return worst, exchange, active


@njit(cache=True, nogil=True)
def _even(gpu_R, terms, num_gpus, m, tokens_R, sums_QG):  # type: ignore[no-untyped-def]
    tokens_R[: len(gpu_R)] = 0
    sums_QG[:] = 0.0
    for e in range(len(m.load_E)):
        if m.copies_E[e] == 1:
            _all_to_one(e, m.copy_R[m.offset_E[e]], gpu_R, m, tokens_R, sums_QG)
        elif m.copies_E[e] > 1:
            _in_turn(e, gpu_R, m, tokens_R, sums_QG)
    return _seconds(gpu_R, terms, num_gpus, tokens_R, sums_QG, m.seconds_G)


@njit(cache=True, nogil=True)
def time_layer(expert_R, gpu_R, primary_R, serving_R, mode, rates, terms, num_gpus, m):  # type: ignore[no-untyped-def]
    """Expert seconds, exchange seconds, copies with tokens; tokens of each GPU into ``m.sums_QG[LOAD]``.

    Args:
        serving_R: whole numbers, 0 where a copy does not serve; every expert with tokens has one that does.
        mode: EVEN, or CHOSEN for the fastest of what ``dispatch_kernels.fastest_quotas`` compares.
        rates: the elastic dispatch's a, b, c, depth, fuel.
        m: the layer's loads, used up, and memory to work in.
    """
    _sort_copies(expert_R, primary_R, serving_R, m)
    replicas, experts = len(expert_R), len(m.load_E)
    if mode == EVEN:
        return _even(gpu_R, terms, num_gpus, m, m.tokens_R, m.sums_QG)
    m.tokens_R[:replicas] = 0
    m.sums_QG[:] = 0.0
    for e in range(experts):
        if m.home_E[e] >= 0:
            _all_to_one(e, m.home_E[e], gpu_R, m, m.tokens_R, m.sums_QG)
    best = _seconds(gpu_R, terms, num_gpus, m.tokens_R, m.sums_QG, m.seconds_G)
    if replicas == experts:
        return best
    even = best
    if terms.reduce_max:
        # before the choice, which uses up the counts; compared after it, as the planner does
        even = _even(gpu_R, terms, num_gpus, m, m.tokens_R, m.other_QG)
    a, b, c, depth, fuel = rates
    before, after = _choose_copies(
        m.load_E, expert_R, gpu_R, primary_R, serving_R, num_gpus, a, b, c, int(depth), int(fuel),
        m.tokens_R[:replicas], m.whole_W, m.real_W,
    )  # fmt: skip
    if after < before:
        chosen_QG = np.zeros((5, num_gpus)) if terms.reduce_max else m.other_QG
        chosen_QG[:] = 0.0
        for e in range(experts):
            if m.copies_E[e] == 1:
                _all_to_one(e, m.copy_R[m.offset_E[e]], gpu_R, m, m.tokens_R, chosen_QG)
            elif m.copies_E[e] > 1:
                _fill(e, gpu_R, m, m.tokens_R, chosen_QG)
        chosen = _seconds(gpu_R, terms, num_gpus, m.tokens_R, chosen_QG, m.seconds_G)
        if chosen[0] + chosen[1] < best[0] + best[1]:
            best = chosen
            m.sums_QG[:] = chosen_QG
    if terms.reduce_max and even[0] + even[1] < best[0] + best[1]:
        best = even
        m.sums_QG[:] = m.other_QG
    return best
