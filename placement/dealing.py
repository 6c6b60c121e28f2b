"""Compiled dealing: how a layer's tokens are given to the copies of their experts, each way written once.

A way of dealing writes rows of (source rank, copy, tokens). What becomes of them is up to its caller: a table of quotas
for an engine, traffic and seconds for a cost model. The tokens come as runs, those of one source rank for one expert,
expert by expert, so that a thousand GPUs need no table of sources by copies.

Axes: S source ranks (rank s is GPU s), E experts, K experts per token, T tokens in order of their ranks, R replicas in
a plan's order, G GPUs, N runs, X rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeless.contracts import BoolArray, FloatArray, Int32Array, IntArray, LayerPlan
from moeless.costs.layer_time import (
    NUM_TRAFFIC,
    add_rows,
    layer_parts,
    total_seconds,
    traffic_seconds,
    work_size,
)
from moeless.jit import njit

#: Shares and tokens below this are none.
TINY = 1e-9
#: Where source ranks begin to count: golden-section steps, so that their roundings do not add up.
_GOLDEN = 0.6180339887498949


class LayerLoad(NamedTuple):
    """A layer's tokens after the gate.

    Attributes:
        tokens_E: tokens of each expert.
        first_E, last_E: each expert's runs, ``first_E[e] <= n < last_E[e]``, in order of their sources.
        source_N, tokens_N: source rank and tokens of each run.
    """

    tokens_E: IntArray
    first_E: IntArray
    last_E: IntArray
    source_N: IntArray
    tokens_N: IntArray


class LayerCopies(NamedTuple):
    """A layer's copies, those that serve also by expert.

    Attributes:
        expert_R, gpu_R, primary_R: as in :class:`~moeless.contracts.LayerPlan`.
        serving_R: whether a copy may be given tokens; every expert with tokens has one that may.
        first_E, by_expert_R: the serving copies of expert e are ``by_expert_R[first_E[e] : first_E[e + 1]]``,
            ascending.
        home_E: the serving primary of each expert, else its first serving copy; -1 for none.
        num_gpus: how many GPUs there are.
    """

    expert_R: Int32Array
    gpu_R: Int32Array
    primary_R: BoolArray
    serving_R: BoolArray
    first_E: IntArray
    by_expert_R: IntArray
    home_E: IntArray
    num_gpus: int


class Dealt(NamedTuple):
    """Room for rows: tokens of a source rank, one or more, that a copy computes. A pair may have several rows."""

    source_X: IntArray
    copy_X: IntArray
    tokens_X: IntArray


class Traffic(NamedTuple):
    """What rows add up to.

    Attributes:
        tokens_R: tokens of each copy.
        traffic_QG: tokens by GPU, see :mod:`moeless.costs.layer_time`.
        seconds_G, work_W: memory to work in.
    """

    tokens_R: IntArray
    traffic_QG: FloatArray
    seconds_G: FloatArray
    work_W: IntArray


@njit(cache=True, nogil=True)
def room_for_load(experts, runs):  # type: ignore[no-untyped-def]
    """Memory for the load of any layer of so many experts and at most so many runs."""
    return LayerLoad(
        np.empty(experts, np.int64), np.empty(experts, np.int64), np.empty(experts, np.int64),
        np.empty(runs, np.int64), np.empty(runs, np.int64),
    )  # fmt: skip


# arrays are taken out of their tuples before each loop: each time costs as much as a step of it


@njit(cache=True, nogil=True, allocates=False)
def take_table(load_SE, load):  # type: ignore[no-untyped-def]
    """Fill ``load`` from tokens by source rank and expert."""
    sources, experts = load_SE.shape
    total_E, first_E, last_E, source_N, tokens_N = load
    for e in range(experts):
        total_E[e], last_E[e] = 0, 0
    for s in range(sources):
        for e in range(experts):
            total_E[e] += load_SE[s, e]
            last_E[e] += load_SE[s, e] > 0
    at = 0
    for e in range(experts):
        runs = last_E[e]
        first_E[e], last_E[e] = at, at
        at += runs
    for s in range(sources):
        for e in range(experts):
            if load_SE[s, e] > 0:
                n = last_E[e]
                source_N[n], tokens_N[n] = s, load_SE[s, e]
                last_E[e] = n + 1


@njit(cache=True, nogil=True, allocates=False)
def take_tokens(topk_TLK, row_T, rank_T, layer, table_SE, load):  # type: ignore[no-untyped-def]
    """Fill ``load`` from the tokens' experts in one layer.

    Args:
        row_T, rank_T: each token's row of ``topk_TLK`` and source rank; the ranks ascend.
        table_SE: memory for a table of the loads where that is smaller than a list of the tokens, else of no rows.
    """
    total_E, first_E, last_E, source_N, tokens_N = load
    top, experts, tokens = topk_TLK.shape[2], len(total_E), len(row_T)
    if len(table_SE) > 0:
        for s in range(table_SE.shape[0]):
            for e in range(experts):
                table_SE[s, e] = 0
        for t in range(tokens):
            row, s = row_T[t], rank_T[t]
            for k in range(top):
                table_SE[s, topk_TLK[row, layer, k]] += 1
        take_table(table_SE, load)
        return
    for e in range(experts):
        total_E[e] = 0
    for t in range(tokens):
        row = row_T[t]
        for k in range(top):
            total_E[topk_TLK[row, layer, k]] += 1
    at = 0
    for e in range(experts):
        first_E[e], last_E[e] = at, at
        at += total_E[e]
    for t in range(tokens):
        row, s = row_T[t], rank_T[t]
        for k in range(top):
            e = topk_TLK[row, layer, k]
            n = last_E[e]
            if n > first_E[e] and source_N[n - 1] == s:
                tokens_N[n - 1] += 1
            else:
                source_N[n], tokens_N[n] = s, 1
                last_E[e] = n + 1


@njit(cache=True, nogil=True, allocates=False)
def mark_serving(expert_R, primary_R, usable_R, alive_E, serving_R):  # type: ignore[no-untyped-def]
    """The copies that may serve: the usable ones, and the primary of an expert that has none.

    A primary that is not usable yet has to be waited for; the caller accounts for that. ``alive_E`` is memory to work
    in.
    """
    for e in range(len(alive_E)):
        alive_E[e] = 0
    for r in range(len(expert_R)):
        serving_R[r] = usable_R[r]
        alive_E[expert_R[r]] += usable_R[r]
    for r in range(len(expert_R)):
        if primary_R[r] and alive_E[expert_R[r]] == 0:
            serving_R[r] = True


@njit(cache=True, nogil=True, allocates=False, inner=True)
def sort_copies(expert_R, primary_R, serving_R, first_E, by_expert_R, home_E):  # type: ignore[no-untyped-def]
    """Fill the last three arguments of :class:`LayerCopies` that follow from the others."""
    experts, serving = len(home_E), 0
    for e in range(experts):
        first_E[e + 1], home_E[e] = 0, -1
    first_E[0] = 0
    for r in range(len(expert_R)):
        if serving_R[r]:
            e = expert_R[r]
            serving += 1
            first_E[e + 1] += 1
            if home_E[e] < 0 or primary_R[r]:
                home_E[e] = r
    for e in range(experts):
        first_E[e + 1] += first_E[e]
    # filled from behind, so that the starts are right again afterwards
    for r in range(len(expert_R) - 1, -1, -1):
        if serving_R[r]:
            e = expert_R[r]
            first_E[e + 1] -= 1
            by_expert_R[first_E[e + 1]] = r
    for e in range(experts):
        first_E[e] = first_E[e + 1]
    first_E[experts] = serving


@njit(cache=True, nogil=True, allocates=False)
def rows_at_most(load, copies):  # type: ignore[no-untyped-def]
    """Rows that any way of dealing may write: each has a token, and one for each run and copy of its expert will do."""
    total_E, first_E, last_E, copy_E = load.tokens_E, load.first_E, load.last_E, copies.first_E
    rows = len(copies.expert_R)
    for e in range(len(first_E)):
        rows += min((last_E[e] - first_E[e]) * max(copy_E[e + 1] - copy_E[e], 1), total_E[e])
    return rows


@njit(cache=True, nogil=True, inner=True)
def room_for_rows(rows):  # type: ignore[no-untyped-def]
    """Memory for so many rows."""
    return Dealt(np.empty(rows, np.int64), np.empty(rows, np.int64), np.empty(rows, np.int64))


@njit(cache=True, nogil=True, inner=True)
def room_for_traffic(replicas, num_gpus):  # type: ignore[no-untyped-def]
    """Memory for what rows add up to."""
    work_W = np.empty(work_size(replicas, num_gpus), np.int64)
    return Traffic(np.empty(replicas, np.int64), np.empty((NUM_TRAFFIC, num_gpus)), np.empty(num_gpus), work_W)


@njit(cache=True, nogil=True, allocates=False)
def deal_to_homes(load, copies, dealt):  # type: ignore[no-untyped-def]
    """All tokens of an expert to its home; returns the number of rows."""
    _, first_E, last_E, source_N, tokens_N = load
    source_X, copy_X, tokens_X = dealt
    home_E = copies.home_E
    x = 0
    for e in range(len(first_E)):
        r = home_E[e]
        if r >= 0:
            for n in range(first_E[e], last_E[e]):
                source_X[x], copy_X[x], tokens_X[x] = source_N[n], r, tokens_N[n]
                x += 1
    return x


@njit(cache=True, nogil=True, allocates=False)
def deal_evenly(load, copies, numbers, costs, dealt):  # type: ignore[no-untyped-def]
    """Equal shares: an expert's tokens, in order of their source ranks, go to its copies in turn.

    Every source rank's tokens and their total are both split so that no two copies differ by more than one token, the
    lowest index having more. Returns the number of rows.
    """
    _, first_E, last_E, source_N, tokens_N = load
    source_X, copy_X, tokens_X = dealt
    copy_E, by_expert_R = copies.first_E, copies.by_expert_R
    x = 0
    for e in range(len(first_E)):
        begin = copy_E[e]
        k, turn = copy_E[e + 1] - begin, 0
        for n in range(first_E[e], last_E[e]):
            s, tokens = source_N[n], tokens_N[n]
            if k == 1:
                source_X[x], copy_X[x], tokens_X[x] = s, by_expert_R[begin], tokens
                x += 1
                continue
            # the copy at ``turn`` has the next token, then every k-th
            for j in range(k):
                ahead = j - turn if j >= turn else j - turn + k
                if tokens > ahead:
                    source_X[x], copy_X[x], tokens_X[x] = s, by_expert_R[begin + j], (tokens - ahead + k - 1) // k
                    x += 1
            if k > 1:
                turn = (turn + tokens) % k
    return x


@njit(cache=True, nogil=True, allocates=False)
def deal_by_shares(load, copies, share_R, dealt):  # type: ignore[no-untyped-def]
    """Each source rank's tokens over the serving copies by shares fixed ahead, knowing no other rank's counts.

    Of n tokens a copy gets its share within one token, and so do the totals nearly: rank s starts to count at its own
    fraction of a token. Where the serving copies have no share, the home takes all. Returns the number of rows.
    """
    _, first_E, last_E, source_N, tokens_N = load
    source_X, copy_X, tokens_X = dealt
    copy_E, by_expert_R, home_E = copies.first_E, copies.by_expert_R, copies.home_E
    x = 0
    for e in range(len(first_E)):
        begin, end = copy_E[e], copy_E[e + 1]
        whole = 0.0
        for j in range(begin, end):
            whole += share_R[by_expert_R[j]]
        for n in range(first_E[e], last_E[e]):
            s, tokens = source_N[n], tokens_N[n]
            if whole <= TINY:
                source_X[x], copy_X[x], tokens_X[x] = s, home_E[e], tokens
                x += 1
                continue
            start, done, last = (s * _GOLDEN) % 1.0, 0.0, 0
            for j in range(begin, end):
                r = by_expert_R[j]
                done += share_R[r] / whole
                # the last copy's bound is the whole, whatever the rounding of shares
                bound = tokens if done >= 1.0 - TINY else min(np.int64(np.floor(done * tokens + start)), tokens)
                if bound > last:
                    source_X[x], copy_X[x], tokens_X[x] = s, r, bound - last
                    x += 1
                last = bound
    return x


@njit(cache=True, nogil=True)
def deal_totals(load, copies, total_R, dealt):  # type: ignore[no-untyped-def]
    """Give each copy its total: the tokens already on its GPU first, then source by source, lowest index first.

    Args:
        total_R: tokens of each copy; of an expert's copies they add up to its tokens.

    Returns the number of rows.
    """
    _, first_E, last_E, source_N, tokens_N = load
    source_X, copy_X, tokens_X = dealt
    copy_E, by_expert_R, gpu_R = copies.first_E, copies.by_expert_R, copies.gpu_R
    x, experts = 0, len(first_E)
    left_N, wanted_R = np.empty(last_E[experts - 1], np.int64), np.empty(len(total_R), np.int64)
    for e in range(experts):
        first, last = first_E[e], last_E[e]
        begin, end = copy_E[e], copy_E[e + 1]
        if end - begin == 1:
            for n in range(first, last):
                source_X[x], copy_X[x], tokens_X[x] = source_N[n], by_expert_R[begin], tokens_N[n]
                x += 1
            continue
        for n in range(first, last):
            left_N[n] = tokens_N[n]
        for j in range(begin, end):
            r = by_expert_R[j]
            wanted_R[r] = total_R[r]
            if wanted_R[r] == 0:
                continue
            low, high, gpu = first, last, gpu_R[r]
            while low < high:
                middle = (low + high) // 2
                if source_N[middle] < gpu:
                    low = middle + 1
                else:
                    high = middle
            if low < last and source_N[low] == gpu and left_N[low] > 0:
                taken = min(left_N[low], wanted_R[r])
                source_X[x], copy_X[x], tokens_X[x] = gpu, r, taken
                x += 1
                left_N[low] -= taken
                wanted_R[r] -= taken
        n = first
        for j in range(begin, end):
            r = by_expert_R[j]
            while wanted_R[r] > 0 and n < last:
                taken = min(left_N[n], wanted_R[r])
                if taken > 0:
                    source_X[x], copy_X[x], tokens_X[x] = source_N[n], r, taken
                    x += 1
                left_N[n] -= taken
                wanted_R[r] -= taken
                if left_N[n] == 0:
                    n += 1
    return x


@njit(cache=True, nogil=True, allocates=False, inner=True)
def dealt_seconds(dealt, rows, copies, costs, traffic):  # type: ignore[no-untyped-def]
    """Seconds of a layer whose tokens are dealt by these rows, its decisions left out; fills ``traffic``."""
    gpu_R, tokens_R, traffic_QG = copies.gpu_R, traffic.tokens_R, traffic.traffic_QG
    add_rows(dealt.source_X, dealt.copy_X, dealt.tokens_X, rows, gpu_R, costs.island_G, tokens_R, traffic_QG)
    expert, exchange = traffic_seconds(
        tokens_R[: len(gpu_R)], gpu_R, traffic_QG, costs, traffic.seconds_G, traffic.work_W
    )
    return total_seconds(layer_parts(expert, exchange, 0.0, 0.0, costs))


@njit(cache=True, nogil=True, allocates=False, inner=True)
def copy_rows(dealt, rows, other):  # type: ignore[no-untyped-def]
    """Write rows into other room."""
    for from_X, to_X in zip(dealt, other):  # noqa: B905
        for x in range(rows):
            to_X[x] = from_X[x]


@njit(cache=True, nogil=True, allocates=False)
def fill_quotas(dealt, rows, quota_SR):  # type: ignore[no-untyped-def]
    """Rows as a table of tokens by source rank and copy."""
    for s in range(quota_SR.shape[0]):
        for r in range(quota_SR.shape[1]):
            quota_SR[s, r] = 0
    source_X, copy_X, tokens_X = dealt
    for x in range(rows):
        quota_SR[source_X[x], copy_X[x]] += tokens_X[x]


class TableRows(NamedTuple):
    """A layer ready to be dealt, and room for its rows."""

    load: LayerLoad
    copies: LayerCopies
    dealt: Dealt


@njit(cache=True, nogil=True)
def table_rows(load_SE, expert_R, gpu_R, primary_R, usable_R, num_gpus):  # type: ignore[no-untyped-def]
    """One layer from a table of tokens by source rank and expert, with the copies that are usable."""
    sources, experts = load_SE.shape
    load, replicas = room_for_load(experts, sources * experts), len(expert_R)
    copies = LayerCopies(
        expert_R, gpu_R, primary_R, np.empty(replicas, np.bool_), np.empty(experts + 1, np.int64),
        np.empty(replicas, np.int64), np.empty(experts, np.int64), num_gpus,
    )  # fmt: skip
    take_layer(load_SE, usable_R, load, copies)
    return TableRows(load, copies, room_for_rows(rows_at_most(load, copies)))


@njit(cache=True, nogil=True, allocates=False, inner=True)
def take_layer(load_SE, usable_R, load, copies):  # type: ignore[no-untyped-def]
    """Fill a layer's load from a table, and what follows of its copies from those that are usable."""
    expert_R, _, primary_R, serving_R, first_E, by_expert_R, home_E, _ = copies
    take_table(load_SE, load)
    mark_serving(expert_R, primary_R, usable_R, home_E, serving_R)
    sort_copies(expert_R, primary_R, serving_R, first_E, by_expert_R, home_E)


@njit(cache=True, nogil=True, allocates=False, inner=True)
def table_size(sources, experts, replicas):  # type: ignore[no-untyped-def]
    """Whole numbers that :func:`rows_in` needs."""
    return 5 * experts + 1 + 2 * sources * experts + replicas


@njit(cache=True, nogil=True, allocates=False, inner=True)
def rows_in(work_W, serving_R, load_SE, expert_R, gpu_R, primary_R, usable_R, num_gpus):  # type: ignore[no-untyped-def]
    """Load and copies as of :func:`table_rows`, in given memory: one array makes for a quicker call than nine.

    They may be used only where that memory is alive, by functions that allocate none.
    """
    sources, experts = load_SE.shape
    runs, replicas, at = sources * experts, len(expert_R), 5 * experts + 1
    load = LayerLoad(
        work_W[:experts], work_W[experts : 2 * experts], work_W[2 * experts : 3 * experts], work_W[at : at + runs],
        work_W[at + runs : at + 2 * runs],
    )  # fmt: skip
    copies = LayerCopies(
        expert_R, gpu_R, primary_R, serving_R, work_W[3 * experts : 4 * experts + 1],
        work_W[at + 2 * runs : at + 2 * runs + replicas], work_W[4 * experts + 1 : at], num_gpus,
    )  # fmt: skip
    take_layer(load_SE, usable_R, load, copies)
    return load, copies


@njit(cache=True, nogil=True)
def quotas_of_totals(load_SE, expert_R, gpu_R, primary_R, usable_R, num_gpus, total_R, quota_SR):  # type: ignore[no-untyped-def]
    """:func:`deal_totals` from a table into a table."""
    load, copies, dealt = table_rows(load_SE, expert_R, gpu_R, primary_R, usable_R, num_gpus)
    fill_quotas(dealt, deal_totals(load, copies, total_R, dealt), quota_SR)


def serving_R(plan: LayerPlan, usable_R: BoolArray, num_experts: int) -> BoolArray:
    """The copies that may serve, ``[R]``: see :func:`mark_serving`."""
    serving, alive_E = np.empty(plan.R, np.bool_), np.empty(num_experts, np.int64)
    mark_serving(plan.expert_R, plan.primary_R, np.asarray(usable_R, np.bool_), alive_E, serving)
    return serving
