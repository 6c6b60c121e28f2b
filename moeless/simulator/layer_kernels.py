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
from moeless.costs.kernels import add_copy, exchange_time, slowest_gpu
from moeless.jit import njit
from moeless.placement.dispatch_kernels import _choose_copies, working_memory
from moeless.placement.fixed_kernels import TINY, share_bound, source_start

#: How tokens are dealt to copies: equal shares, or the elastic planner's choice from the true counts.
EVEN, CHOSEN = 0, 1
#: Tokens of each GPU by direction and link tier, and all that it computes.
SENT_FAST, SENT_SLOW, GOT_FAST, GOT_SLOW, LOAD = 0, 1, 2, 3, 4


class Memory(NamedTuple):
    """What one layer's timing works in, and its loads; made by :func:`memory`, filled from a table or from tokens.

    Few arrays of many rows: a call hands on a reference to each.

    Attributes:
        island_G: link island of each GPU.
        table_SE: tokens by source and expert, where that is smaller than a list of them; otherwise of no rows.
        expert_XE: by expert its tokens, the range of its runs, and what ``_sort_copies`` writes.
        run_2N: source and tokens of each run.
        copy_XR: copies by expert, tokens of each copy, and of each while they are dealt out.
        sums_XG: five rows of tokens by GPU that a layer ends with, five of another choice, and seconds.
    """

    island_G: IntArray
    table_SE: IntArray
    expert_XE: IntArray
    run_2N: IntArray
    copy_XR: IntArray
    sums_XG: FloatArray
    whole_W: IntArray
    real_W: FloatArray


_TOKENS, _FIRST, _LAST, _FILL, _HOME, _COPIES, _OFFSET = 0, 1, 2, 3, 4, 5, 6
_BY_EXPERT, _DEALT, _LEFT = 0, 1, 2


@njit(cache=True, nogil=True)
def memory(sources, experts, replicas, gpus, island_size, tokens):  # type: ignore[no-untyped-def]
    """Enough for any layer of up to so many replicas and so many tokens, each expert of a token counted."""
    # the choice of copies alone needs no room for sources
    whole, real = working_memory(0, experts, replicas, gpus)
    # a table where it is smaller than the tokens are many
    rows = sources if sources * experts <= tokens else 0
    return Memory(
        np.arange(gpus) // island_size,
        np.empty((rows, experts), np.int64),
        np.empty((7, experts + 1), np.int64),
        np.empty((2, min(sources * experts, tokens)), np.int64),
        np.empty((3, replicas), np.int64),
        np.empty((11, gpus)),
        np.empty(whole, np.int64),
        np.empty(real),
    )


@njit(cache=True, nogil=True)
def load_table(load_SE, m):  # type: ignore[no-untyped-def]
    """Take a layer's loads from a table of source ranks by experts."""
    x_XE, run_2N = m.expert_XE, m.run_2N
    sources, experts = load_SE.shape
    for e in range(experts):
        x_XE[_TOKENS, e], x_XE[_FILL, e] = 0, 0
    for s in range(sources):
        for e in range(experts):
            n = load_SE[s, e]
            x_XE[_TOKENS, e] += n
            x_XE[_FILL, e] += n > 0
    at = 0
    for e in range(experts):
        x_XE[_FIRST, e], x_XE[_LAST, e] = at, at
        at += x_XE[_FILL, e]
    for s in range(sources):
        for e in range(experts):
            n = load_SE[s, e]
            if n > 0:
                i = x_XE[_LAST, e]
                run_2N[0, i], run_2N[1, i] = s, n
                x_XE[_LAST, e] = i + 1


@njit(cache=True, nogil=True)
def load_tokens(topk_TLK, row_T, rank_T, layer, m):  # type: ignore[no-untyped-def]
    """Take a layer's loads from its tokens' experts: rows of ``topk_TLK`` and source ranks, the ranks ascending."""
    x_XE, run_2N, table_SE = m.expert_XE, m.run_2N, m.table_SE
    top, experts, tokens = topk_TLK.shape[2], x_XE.shape[1] - 1, len(row_T)
    if len(table_SE) > 0:
        table_SE[:] = 0
        for t in range(tokens):
            row, s = row_T[t], rank_T[t]
            for k in range(top):
                table_SE[s, topk_TLK[row, layer, k]] += 1
        load_table(table_SE, m)
        return
    for e in range(experts):
        x_XE[_TOKENS, e] = 0
    for t in range(tokens):
        row = row_T[t]
        for k in range(top):
            x_XE[_TOKENS, topk_TLK[row, layer, k]] += 1
    at = 0
    for e in range(experts):
        x_XE[_FIRST, e], x_XE[_LAST, e] = at, at
        at += x_XE[_TOKENS, e]
    for t in range(tokens):
        row, s = row_T[t], rank_T[t]
        for k in range(top):
            e = topk_TLK[row, layer, k]
            i = x_XE[_LAST, e]
            if i > x_XE[_FIRST, e] and run_2N[0, i - 1] == s:
                run_2N[1, i - 1] += 1
            else:
                run_2N[0, i], run_2N[1, i] = s, 1
                x_XE[_LAST, e] = i + 1


@njit(cache=True, nogil=True)
def _sort_copies(expert_R, primary_R, serving_R, x_XE, copy_XR):  # type: ignore[no-untyped-def]
    """Serving copies of each expert, ascending, by its offset; the one that takes all by itself."""
    experts = x_XE.shape[1] - 1
    for e in range(experts):
        x_XE[_COPIES, e], x_XE[_HOME, e] = 0, -1
    for r in range(len(expert_R)):
        if serving_R[r]:
            e = expert_R[r]
            x_XE[_COPIES, e] += 1
            if x_XE[_HOME, e] < 0 or primary_R[r]:
                x_XE[_HOME, e] = r
    x_XE[_OFFSET, 0] = 0
    for e in range(experts):
        x_XE[_OFFSET, e + 1] = x_XE[_OFFSET, e] + x_XE[_COPIES, e]
        x_XE[_FILL, e] = x_XE[_OFFSET, e]
    for r in range(len(expert_R)):
        if serving_R[r]:
            e = expert_R[r]
            copy_XR[_BY_EXPERT, x_XE[_FILL, e]] = r
            x_XE[_FILL, e] += 1


@njit(cache=True, nogil=True, inline="always")
def _send(s, g, n, island_G, sums_QG):  # type: ignore[no-untyped-def]
    if s != g:
        tier = 0 if island_G[s] == island_G[g] else 1
        sums_QG[SENT_FAST + tier, s] += n
        sums_QG[GOT_FAST + tier, g] += n


@njit(cache=True, nogil=True)
def _clear(replicas, copy_XR, sums_QG):  # type: ignore[no-untyped-def]
    for r in range(replicas):
        copy_XR[_DEALT, r] = 0
    for q in range(5):
        for g in range(sums_QG.shape[1]):
            sums_QG[q, g] = 0.0


@njit(cache=True, nogil=True)
def _static(gpu_R, island_G, x_XE, run_2N, copy_XR, sums_QG):  # type: ignore[no-untyped-def]
    """All tokens of an expert to its home."""
    _clear(len(gpu_R), copy_XR, sums_QG)
    for e in range(x_XE.shape[1] - 1):
        r = x_XE[_HOME, e]
        if r >= 0:
            copy_XR[_DEALT, r] = x_XE[_TOKENS, e]
            g = gpu_R[r]
            for i in range(x_XE[_FIRST, e], x_XE[_LAST, e]):
                _send(run_2N[0, i], g, run_2N[1, i], island_G, sums_QG)


@njit(cache=True, nogil=True)
def _even(gpu_R, island_G, x_XE, run_2N, copy_XR, sums_QG):  # type: ignore[no-untyped-def]
    """As ``dispatch.even_dispatch``: the tokens, source by source, to the copies in turn."""
    _clear(len(gpu_R), copy_XR, sums_QG)
    for e in range(x_XE.shape[1] - 1):
        before, k, offset = 0, x_XE[_COPIES, e], x_XE[_OFFSET, e]
        for i in range(x_XE[_FIRST, e], x_XE[_LAST, e]):
            s, n = run_2N[0, i], run_2N[1, i]
            for j in range(k):
                # of the expert's tokens before .. before + n, every k-th is this copy's
                first = (j - before) % k
                if n > first:
                    r = copy_XR[_BY_EXPERT, offset + j]
                    share = (n - first + k - 1) // k
                    copy_XR[_DEALT, r] += share
                    _send(s, gpu_R[r], share, island_G, sums_QG)
            before += n


@njit(cache=True, nogil=True)
def _shared(gpu_R, share_R, island_G, x_XE, run_2N, copy_XR, sums_QG):  # type: ignore[no-untyped-def]
    """As ``fixed_kernels.split_by_shares``: each source's tokens by the serving copies' shares, fixed ahead."""
    _clear(len(gpu_R), copy_XR, sums_QG)
    for e in range(x_XE.shape[1] - 1):
        begin, end = x_XE[_OFFSET, e], x_XE[_OFFSET, e + 1]
        whole = 0.0
        for j in range(begin, end):
            whole += share_R[copy_XR[_BY_EXPERT, j]]
        for i in range(x_XE[_FIRST, e], x_XE[_LAST, e]):
            s, n = run_2N[0, i], run_2N[1, i]
            if whole <= TINY:
                r = x_XE[_HOME, e]
                copy_XR[_DEALT, r] += n
                _send(s, gpu_R[r], n, island_G, sums_QG)
                continue
            start, done, last = source_start(s), 0.0, 0
            for j in range(begin, end):
                r = copy_XR[_BY_EXPERT, j]
                done += share_R[r] / whole
                bound = share_bound(done, n, start)
                copy_XR[_DEALT, r] += bound - last
                _send(s, gpu_R[r], bound - last, island_G, sums_QG)
                last = bound


@njit(cache=True, nogil=True)
def _fill(gpu_R, island_G, x_XE, run_2N, copy_XR, sums_QG):  # type: ignore[no-untyped-def]
    """As ``dispatch_kernels.fill_sources`` for the tokens dealt: a copy's own GPU first, then source by source.

    Uses up the runs' tokens.
    """
    for q in range(5):
        for g in range(sums_QG.shape[1]):
            sums_QG[q, g] = 0.0
    for e in range(x_XE.shape[1] - 1):
        first, last = x_XE[_FIRST, e], x_XE[_LAST, e]
        begin, end = x_XE[_OFFSET, e], x_XE[_OFFSET, e + 1]
        if end - begin > 1:
            for j in range(begin, end):
                r = copy_XR[_BY_EXPERT, j]
                left, low, high, g = copy_XR[_DEALT, r], first, last, gpu_R[r]
                if left > 0:
                    while low < high:
                        middle = (low + high) // 2
                        if run_2N[0, middle] < g:
                            low = middle + 1
                        else:
                            high = middle
                    if low < last and run_2N[0, low] == g:
                        taken = min(run_2N[1, low], left)
                        run_2N[1, low] -= taken
                        left -= taken
                copy_XR[_LEFT, r] = left
        elif end > begin:
            copy_XR[_LEFT, copy_XR[_BY_EXPERT, begin]] = x_XE[_TOKENS, e]
        i = first
        for j in range(begin, end):
            r = copy_XR[_BY_EXPERT, j]
            left, g = copy_XR[_LEFT, r], gpu_R[r]
            while left > 0 and i < last:
                taken = min(run_2N[1, i], left)
                _send(run_2N[0, i], g, taken, island_G, sums_QG)
                run_2N[1, i] -= taken
                left -= taken
                if run_2N[1, i] == 0:
                    i += 1


@njit(cache=True, nogil=True)
def _seconds(gpu_R, terms, tokens_R, sums_QG, seconds_G):  # type: ignore[no-untyped-def]
    """Expert and exchange seconds, and copies with tokens; fills ``sums_QG[LOAD]``."""
    active, num_gpus = 0, len(seconds_G)
    for g in range(num_gpus):
        seconds_G[g] = 0.0
    for r in range(len(gpu_R)):
        n = tokens_R[r]
        if n > 0:
            active += 1
            g = gpu_R[r]
            sums_QG[LOAD, g] += n
            add_copy(n, g, terms, seconds_G)
    exchange = exchange_time(
        sums_QG[SENT_FAST], sums_QG[SENT_SLOW], sums_QG[GOT_FAST], sums_QG[GOT_SLOW], sums_QG[LOAD], terms, num_gpus
    )
    return slowest_gpu(seconds_G, terms), exchange, active


@njit(cache=True, nogil=True)
def time_layer(expert_R, gpu_R, primary_R, serving_R, share_R, mode, rates, terms, num_gpus, m):  # type: ignore[no-untyped-def]
    """Expert seconds, exchange seconds, copies with tokens; tokens of each GPU into ``m.sums_XG[LOAD]``.

    Args:
        serving_R: whole numbers, 0 where a copy does not serve; every expert with tokens has one that does.
        share_R: each copy's part of its expert's tokens where that is fixed ahead; empty: ``mode`` says who serves.
        mode: EVEN, or CHOSEN for the fastest of what ``dispatch_kernels.fastest_quotas`` compares.
        rates: the elastic dispatch's a, b, c, depth, fuel.
        m: the layer's loads, used up, and memory to work in.
    """
    island_G, x_XE, run_2N, copy_XR = m.island_G, m.expert_XE, m.run_2N, m.copy_XR
    sums_QG, other_QG, seconds_G = m.sums_XG[:5], m.sums_XG[5:10], m.sums_XG[10]
    replicas, experts = len(expert_R), x_XE.shape[1] - 1
    tokens_R = copy_XR[_DEALT, :replicas]
    _sort_copies(expert_R, primary_R, serving_R, x_XE, copy_XR)
    if len(share_R) > 0:
        _shared(gpu_R, share_R, island_G, x_XE, run_2N, copy_XR, sums_QG)
        return _seconds(gpu_R, terms, tokens_R, sums_QG, seconds_G)
    if mode == EVEN and replicas > experts:
        _even(gpu_R, island_G, x_XE, run_2N, copy_XR, sums_QG)
        return _seconds(gpu_R, terms, tokens_R, sums_QG, seconds_G)
    _static(gpu_R, island_G, x_XE, run_2N, copy_XR, sums_QG)
    best = _seconds(gpu_R, terms, tokens_R, sums_QG, seconds_G)
    if replicas == experts:
        return best
    even = best
    if terms.reduce_max:
        # before the choice, which uses up the counts; compared after it, as the planner does
        _even(gpu_R, island_G, x_XE, run_2N, copy_XR, other_QG)
        even = _seconds(gpu_R, terms, tokens_R, other_QG, seconds_G)
    a, b, c, depth, fuel = rates
    before, after = _choose_copies(
        x_XE[_TOKENS, :experts], expert_R, gpu_R, primary_R, serving_R, num_gpus, a, b, c, int(depth), int(fuel),
        tokens_R, m.whole_W, m.real_W,
    )  # fmt: skip
    if after < before:
        chosen_QG = np.empty((5, num_gpus)) if terms.reduce_max else other_QG
        _fill(gpu_R, island_G, x_XE, run_2N, copy_XR, chosen_QG)
        chosen = _seconds(gpu_R, terms, tokens_R, chosen_QG, seconds_G)
        if chosen[0] + chosen[1] < best[0] + best[1]:
            best = chosen
            sums_QG[:] = chosen_QG
    if terms.reduce_max and even[0] + even[1] < best[0] + best[1]:
        best = even
        sums_QG[:] = other_QG
    return best
