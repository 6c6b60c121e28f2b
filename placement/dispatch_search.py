"""Compiled search for the tokens of each copy: level GPUs, then shed load along the shortest chains of copies.

A layer's time is ``max_g time_g + c max_g tokens_g``: a GPU's time is the sum over its used copies of
``max(a n, b)`` for n tokens, its tokens are what it exchanges.

Only *movable* copies take part: loaded experts with more than one usable copy. What stays is in the GPUs' totals.

For a pair of limits (time, tokens), a first pass lowers the squared excess over them pair by pair, which settles what
is continuous; then each GPU above a limit sheds by the best direct move or by a labelled path (each GPU keeps the
least excess with which a chain reaches it), which may close at the GPU it started from: a swap. The limits are lowered
together, then one at the other's expense. What is stuck from one start is tried again from others, and from the best
so far with one copy of its busiest GPU served elsewhere.

What is called with many arrays is compiled into its caller: handing them over took a quarter of the time.
Axes: M movable copies sorted by GPU, G GPUs, W a search's working memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeless.contracts import IntArray
from moeless.jit import njit

#: Copies up to which the next largest is looked for rather than sorted out.
FEW = 96
#: Part of the room over the least time that is not worth a search.
ENOUGH = 0.01
#: Fuel of each try from the best with a copy served elsewhere.
TRY = 100
#: Rows of a label: excess, then the time and tokens of the chain's first GPU after its first move.
_EXCESS, _TIME, _LOAD = 0, 1, 2
#: Rows of a label's way: copies and tokens of its last move, GPUs passed on (negative once gone on from).
_FROM, _TO, _MOVED, _HOPS = 0, 1, 2, 3


class Copies(NamedTuple):
    """Tokens, GPU and next copy of each movable copy; the ring of next copies links those of an expert.

    Positions are unsigned: compiled code then need not ask whether they count from the end.
    """

    tokens_M: IntArray
    gpu_M: np.ndarray
    next_M: np.ndarray


@njit(cache=True, nogil=True, inline="always")
def copies_in(whole_W, copies):  # type: ignore[no-untyped-def]
    """So many copies, whatever they hold, in the first ``2 * copies`` whole numbers of ``whole_W``."""
    at_2M = whole_W[copies : 2 * copies].view(np.uint32)
    return Copies(whole_W[:copies], at_2M[:copies], at_2M[copies:])


@njit(cache=True, nogil=True)
def _busy(n, a, b):  # type: ignore[no-untyped-def]
    return max(a * n, b) if n > 0 else 0.0


@njit(cache=True, nogil=True, inline="always")
def _move(r, q, m, tokens_M, gpu_M, time_G, tokens_G, a, b):  # type: ignore[no-untyped-def]
    g, h, n, k = gpu_M[r], gpu_M[q], tokens_M[r], tokens_M[q]
    time_G[g] += _busy(n - m, a, b) - _busy(n, a, b)
    time_G[h] += _busy(k + m, a, b) - _busy(k, a, b)
    tokens_G[g] -= m
    tokens_G[h] += m
    tokens_M[r] = n - m
    tokens_M[q] = k + m


@njit(cache=True, nogil=True)
def gather(state, time_G, tokens_G, a, b):  # type: ignore[no-untyped-def]
    """Take all movable tokens off the GPUs: each expert's total to its first copy, the GPUs' totals without them."""
    tokens_M, gpu_M, next_M = state
    for r in range(len(tokens_M)):
        n = tokens_M[r]
        if n > 0:
            g = gpu_M[r]
            time_G[g] -= _busy(n, a, b)
            tokens_G[g] -= n
    for r in range(len(tokens_M)):
        q = next_M[r]
        while q > r:
            tokens_M[r] += tokens_M[q]
            tokens_M[q] = 0
            q = next_M[q]


@njit(cache=True, nogil=True, inline="always")
def _serve(first, state, time_G, tokens_G, a, b, c):  # type: ignore[no-untyped-def]
    """All tokens of a gathered expert to its copy on the least busy GPU; ``first`` is the copy that holds them."""
    tokens_M, gpu_M, next_M = state
    n, to = tokens_M[first], first
    least = time_G[gpu_M[first]] + c * tokens_G[gpu_M[first]]
    q = next_M[first]
    while q != first:
        h = gpu_M[q]
        if time_G[h] + c * tokens_G[h] < least:
            to, least = q, time_G[h] + c * tokens_G[h]
        q = next_M[q]
    tokens_M[first] = 0
    tokens_M[to] = n
    h = gpu_M[to]
    time_G[h] += _busy(n, a, b)
    tokens_G[h] += n


@njit(cache=True, nogil=True)
def spread(state, time_G, tokens_G, a, b, c, left_M):  # type: ignore[no-untyped-def]
    """Serve each movable expert whole, the largest first, by its copy on the least busy GPU."""
    gather(state, time_G, tokens_G, a, b)
    copies = len(state.tokens_M)
    for r in range(copies):
        left_M[r] = state.tokens_M[r]
    if copies > FEW:
        # the same order, ties to the lowest; sorting takes memory
        for r in np.argsort(-state.tokens_M, kind="mergesort"):
            if left_M[r] > 0:
                _serve(r, state, time_G, tokens_G, a, b, c)
        return
    while True:
        first, most = -1, 0
        for r in range(copies):
            if left_M[r] > most:
                first, most = r, left_M[r]
        if first < 0:
            return
        left_M[first] = 0
        _serve(first, state, time_G, tokens_G, a, b, c)


@njit(cache=True, nogil=True)
def least_totals(state, first_G, time_G, tokens_G, a, b, root_G):  # type: ignore[no-untyped-def]
    """Time and tokens that the GPU with most of either has at least, whatever becomes of the movable tokens.

    GPUs that no movable expert links, directly or over others, share nothing: each group keeps its sum, and so at
    least its mean. ``state`` must not split experts.
    """
    tokens_M, gpu_M, next_M = state
    num_gpus, copies = len(time_G), len(tokens_M)
    for g in range(num_gpus):
        root_G[g] = g
    for r in range(copies):
        g, h = root_G[gpu_M[r]], root_G[gpu_M[next_M[r]]]
        if g != h:
            for i in range(num_gpus):
                if root_G[i] == h:
                    root_G[i] = g
    low_time, low_tokens = 0.0, 0
    for g in range(num_gpus):
        fixed_time, fixed_tokens = time_G[g], tokens_G[g]
        for r in range(first_G[g], first_G[g + 1]):
            fixed_time -= _busy(tokens_M[r], a, b)
            fixed_tokens -= tokens_M[r]
        low_time, low_tokens = max(low_time, fixed_time), max(low_tokens, fixed_tokens)
        if root_G[g] == g:
            size, time, tokens = 0, 0.0, 0
            for h in range(num_gpus):
                if root_G[h] == g:
                    size += 1
                    time += time_G[h]
                    tokens += tokens_G[h]
            low_time, low_tokens = max(low_time, time / size), max(low_tokens, (tokens + size - 1) // size)
    return low_time, low_tokens


@njit(cache=True, nogil=True, inline="always")
def _excess(time_g, time_h, tokens_g, tokens_h, limit, most, c, small):  # type: ignore[no-untyped-def]
    """Squared excess of two GPUs over the limits; ``small`` breaks ties for less time in all."""
    g, h = max(time_g - limit, 0.0), max(time_h - limit, 0.0)
    m, k = c * max(tokens_g - most, 0), c * max(tokens_h - most, 0)
    return g * g + h * h + m * m + k * k + small * (time_g + time_h)


@njit(cache=True, nogil=True, inline="always")
def level(tokens_M, gpu_M, next_M, time_G, tokens_G, a, b, c, limit, most, sweeps, fuel):  # type: ignore[no-untyped-def]
    """Move tokens between copies where that lowers the squared excess over the limits; returns pairs examined."""
    small, floor, weight = 1e-5 * limit, b / a, 0.5 / (a + c)
    examined = 0
    for _ in range(sweeps):
        changed = False
        for r in range(len(tokens_M)):
            g = gpu_M[r]
            q = next_M[r]
            while q != r:
                h = gpu_M[q]
                time_g, time_h, tokens_g, tokens_h = time_G[g], time_G[h], tokens_G[g], tokens_G[h]
                if q > r and (max(time_g, time_h) > limit or max(tokens_g, tokens_h) > most):
                    n, k = tokens_M[r], tokens_M[q]
                    both = n + k
                    here, there = time_g - _busy(n, a, b), time_h - _busy(k, a, b)
                    few_g, few_h = tokens_g - n, tokens_h - k
                    whole = max(a * both, b)
                    examined += 1
                    least = _excess(time_g, time_h, tokens_g, tokens_h, limit, most, c, small) * (1 - 1e-9)
                    keep = n
                    value = _excess(here, there + whole, few_g, few_h + both, limit, most, c, small)
                    if value < least:
                        least, keep = value, 0
                    value = _excess(here + whole, there, few_g + both, few_h, limit, most, c, small)
                    if value < least:
                        least, keep = value, both
                    if both > floor:
                        x = (there - here + c * (few_h - few_g)) * weight + 0.5 * both
                        x = int(min(max(x, min(floor, both - floor)), max(floor, both - floor)))
                        y = both - x
                        value = _excess(
                            here + max(a * x, b), there + max(a * y, b), few_g + x, few_h + y, limit, most, c, small
                        )
                        if value < least:
                            least, keep = value, x
                    if keep != n:
                        _move(r, q, n - keep, tokens_M, gpu_M, time_G, tokens_G, a, b)
                        changed = True
                q = next_M[q]
            if examined > fuel:
                return examined
        if not changed:
            break
    return examined


@njit(cache=True, nogil=True, inline="always")
def _direct(g, limit, most, tokens_M, gpu_M, next_M, time_G, tokens_G, first_G, a, b, c):  # type: ignore[no-untyped-def]
    """Make the one move off GPU g that helps most for what it wastes; returns whether there was any."""
    per_token = 1.0 / a
    over, many = max(time_G[g] - limit, 0.0), max(tokens_G[g] - most, 0)
    wanted = max(int(np.ceil(over * per_token - 1e-9)), many)
    best, best_r, best_q, best_m = 0.0, -1, -1, 0
    for r in range(first_G[g], first_G[g + 1]):
        n = tokens_M[r]
        if n == 0:
            continue
        here = _busy(n, a, b)
        q = next_M[r]
        while q != r:
            h, k = gpu_M[q], tokens_M[q]
            there = _busy(k, a, b)
            room = limit - time_G[h] + there
            if h != g and room >= b:
                fits = min(min(int(room * per_token + 1e-9) - k, most - tokens_G[h]), n)
                for option in range(2):
                    m = fits if option == 0 else wanted
                    if m <= 0 or m > fits or (option == 1 and m == fits):
                        continue
                    gain = here - _busy(n - m, a, b)
                    waste = max(_busy(k + m, a, b) - there - gain, 0.0)
                    score = min(gain, over) + c * min(m, many) - 0.5 * waste
                    if score > best or (score == best and best_r >= 0 and m < best_m):
                        best, best_r, best_q, best_m = score, r, q, m
            q = next_M[q]
    if best_r < 0:
        return False
    _move(best_r, best_q, best_m, tokens_M, gpu_M, time_G, tokens_G, a, b)
    return True


@njit(cache=True, nogil=True, inline="always")
def _chain(  # type: ignore[no-untyped-def]
    root, limit, most, depth, tokens_M, gpu_M, next_M, time_G, tokens_G, first_G, label_3G, way_4G, queue_G, counter,
    a, b, c,
):  # fmt: skip
    """Lower GPU ``root`` by one chain that leaves every other GPU within the limits; returns whether there was one.

    ``counter[0]`` goes down by one for each pair of copies examined.
    """
    per_token, eps = 1.0 / a, 1e-9 * limit
    for g in range(len(queue_G)):
        label_3G[_EXCESS, g], way_4G[_HOPS, g] = np.inf, -1
    way_4G[_HOPS, root], queue_G[0] = 0, root
    head, tail, last, end_r, end_q, end_m = 0, 1, -1, -1, -1, 0
    before = max(time_G[root] - limit, 0.0) + c * max(tokens_G[root] - most, 0)
    while head < tail and last < 0:
        u = queue_G[head]
        head += 1
        over, many, arrived = time_G[u] - limit, tokens_G[u] - most, -1
        if u != root:
            arrived = way_4G[_TO, u]
            k, m = tokens_M[arrived], way_4G[_MOVED, u]
            over += _busy(k + m, a, b) - _busy(k, a, b)
            many += m
        hops = way_4G[_HOPS, u]
        way_4G[_HOPS, u] = -2
        for r in range(first_G[u], first_G[u + 1]):
            n = tokens_M[r]
            if n == 0 or r == arrived or last >= 0:
                continue
            here = _busy(n, a, b)
            # the fewest tokens that bring u within the limits
            need = max(many, 0)
            if over > eps:
                rest = here - over
                need = max(need, n if rest < b - eps else n - int(rest * per_token + 1e-9))
            enough = 0 < need <= n and here - _busy(n - need, a, b) >= over - eps
            if not enough and u != root:
                continue
            q = next_M[r]
            while q != r and last < 0:
                counter[0] -= 1
                h, k = gpu_M[q], tokens_M[q]
                there = _busy(k, a, b)
                for option in range(2):
                    m = need if option == 0 else n
                    if (option == 0 and not enough) or (option == 1 and enough and need == n):
                        continue
                    added = _busy(k + m, a, b) - there
                    if h == root and u != root:
                        time, tokens = label_3G[_TIME, u] + added, label_3G[_LOAD, u] + m
                        if max(time - limit, 0.0) + c * max(tokens - most, 0.0) < 0.9 * before:
                            last, end_r, end_q, end_m = u, r, q, m
                            break
                    elif h != u and way_4G[_HOPS, h] >= -1:
                        excess, more = time_G[h] + added - limit, tokens_G[h] + m - most
                        if excess <= eps and more <= 0:
                            last, end_r, end_q, end_m = u, r, q, m
                            break
                        freed = here - _busy(n - m, a, b)
                        score = max(excess, 0.0) + c * max(more, 0) + max(added - freed, 0.0)
                        if hops + 1 < depth and score < label_3G[_EXCESS, h]:
                            if label_3G[_EXCESS, h] == np.inf:
                                queue_G[tail] = h
                                tail += 1
                            label_3G[_EXCESS, h] = score
                            way_4G[_FROM, h], way_4G[_TO, h], way_4G[_MOVED, h] = r, q, m
                            way_4G[_HOPS, h] = hops + 1
                            if u == root:
                                label_3G[_TIME, h] = time_G[root] - freed
                                label_3G[_LOAD, h] = tokens_G[root] - m
                            else:
                                label_3G[_TIME, h] = label_3G[_TIME, u]
                                label_3G[_LOAD, h] = label_3G[_LOAD, u]
                q = next_M[q]
    if last < 0:
        return False
    _move(end_r, end_q, end_m, tokens_M, gpu_M, time_G, tokens_G, a, b)
    while last != root:
        r, q, m = way_4G[_FROM, last], way_4G[_TO, last], way_4G[_MOVED, last]
        _move(r, q, m, tokens_M, gpu_M, time_G, tokens_G, a, b)
        last = gpu_M[r]
    return True


@njit(cache=True, nogil=True, inline="always")
def _highest(time_G, tokens_G):  # type: ignore[no-untyped-def]
    """Most time and most tokens of any GPU."""
    time, tokens = time_G[0], tokens_G[0]
    for g in range(1, len(time_G)):
        time, tokens = max(time, time_G[g]), max(tokens, tokens_G[g])
    return time, tokens


@njit(cache=True, nogil=True)
def working_memory(copies, num_gpus):  # type: ignore[no-untyped-def]
    """Whole and real numbers that :func:`search` (and :func:`shorten`) needs beside the state."""
    return 2 * copies + 7 * num_gpus + 1, 4 * num_gpus


@njit(cache=True, nogil=True, inline="always")
def shorten(  # type: ignore[no-untyped-def]
    state, first_G, time_G, tokens_G, low_time, low_tokens, least, a, b, c, depth, fuel, levels, whole_W, real_W
):
    """Lower ``max time + c * max tokens`` from ``state``, in place; returns what is reached and the fuel left.

    Args:
        state: tokens, GPU and next copy of each movable copy.
        first_G: ``first_G[g] .. first_G[g + 1]`` are GPU g's movable copies.
        time_G, tokens_G: totals of each GPU, movable copies included.
        low_time, low_tokens: of :func:`least_totals`.
        least: time at which the search ends.
        depth: GPUs that a chain may pass on.
        fuel: pairs of copies examined before the search stops.
        levels: level GPUs first.
        whole_W, real_W: working memory, see :func:`working_memory`.
    """
    tokens_M, gpu_M, next_M = state
    num_gpus, copies = len(time_G), len(tokens_M)
    best_time, best_tokens = _highest(time_G, tokens_G)
    kept_M, kept_time_G, kept_tokens_G = whole_W[:copies], real_W[:num_gpus], whole_W[copies : copies + num_gpus]
    label_3G = real_W[num_gpus : 4 * num_gpus].reshape(3, num_gpus)
    at = copies + num_gpus
    way_4G = whole_W[at : at + 4 * num_gpus].reshape(4, num_gpus)
    queue_G, counter = whole_W[at + 4 * num_gpus : at + 5 * num_gpus], whole_W[at + 5 * num_gpus :]
    counter[0] = fuel
    for r in range(copies):
        kept_M[r] = tokens_M[r]
    for g in range(num_gpus):
        kept_time_G[g], kept_tokens_G[g] = time_G[g], tokens_G[g]
    share, mode, failed, first = 1.0 if levels else 0.3, 0, 0, levels
    while counter[0] > 0 and failed < 3:
        gap_time, gap_tokens = max(best_time - low_time, 0.0), max(best_tokens - low_tokens, 0)
        if best_time + c * best_tokens < least:
            break
        limit, most = best_time - share * gap_time, best_tokens - int(share * gap_tokens)
        met = True
        if first:
            counter[0] -= level(tokens_M, gpu_M, next_M, time_G, tokens_G, a, b, c, limit, most, 6, counter[0])
        else:
            if mode == 1:
                most = best_tokens + (int(0.9 * share * gap_time / c) if c > 0 else best_tokens)
            elif mode == 2:
                limit = best_time + 0.9 * c * share * gap_tokens
            for g in range(num_gpus):
                tries = 0
                while met and (time_G[g] > limit * (1 + 1e-9) or tokens_G[g] > most):
                    tries += 1
                    counter[0] -= first_G[g + 1] - first_G[g]
                    met = tries <= 8 and (
                        _direct(g, limit, most, tokens_M, gpu_M, next_M, time_G, tokens_G, first_G, a, b, c)
                        or _chain(
                            g, limit, most, depth, tokens_M, gpu_M, next_M, time_G, tokens_G, first_G, label_3G, way_4G,
                            queue_G, counter, a, b, c,
                        )
                    )  # fmt: skip
                if not met:
                    break
        time, tokens = _highest(time_G, tokens_G)
        better = time + c * tokens < (best_time + c * best_tokens) * (1 - 1e-9)
        if better:
            best_time, best_tokens, failed = time, tokens, 0
            for r in range(copies):
                kept_M[r] = tokens_M[r]
            for g in range(num_gpus):
                kept_time_G[g], kept_tokens_G[g] = time_G[g], tokens_G[g]
        elif not first or counter[0] <= 0:
            # chains go on from the levelled tokens, whatever those were worth, where there is fuel for any
            for r in range(copies):
                tokens_M[r] = kept_M[r]
            for g in range(num_gpus):
                time_G[g], tokens_G[g] = kept_time_G[g], kept_tokens_G[g]
        if first:
            share, first = 0.5, False
        elif met and better:
            share = min(2 * share, 1.0)
        else:
            share *= 0.25
            if share < 0.1:
                share, mode, failed = 0.15, (mode + 1) % 3, failed + 1
    return best_time + c * best_tokens, counter[0]


@njit(cache=True, nogil=True, inline="always")
def _restore(best_M, state, time_G, tokens_G, a, b):  # type: ignore[no-untyped-def]
    """Back to these tokens, totals too."""
    for r in range(len(best_M)):
        n, k = state.tokens_M[r], best_M[r]
        if n != k:
            g = state.gpu_M[r]
            time_G[g] += _busy(k, a, b) - _busy(n, a, b)
            tokens_G[g] += k - n
            state.tokens_M[r] = k


@njit(cache=True, nogil=True, inline="always")
def _disturb(moved, state, first_G, time_G, tokens_G, a, b, c):  # type: ignore[no-untyped-def]
    """Take all tokens of the busiest GPU's next copy from ``moved`` on to the expert's next one.

    Returns the number of copies passed, -1 where none is left.
    """
    tokens_M, gpu_M, next_M = state
    g = 0
    for h in range(1, len(time_G)):
        if time_G[h] + c * tokens_G[h] > time_G[g] + c * tokens_G[g]:
            g = h
    for r in range(first_G[g] + moved, first_G[g + 1]):
        if tokens_M[r] > 0:
            _move(r, next_M[r], tokens_M[r], tokens_M, gpu_M, time_G, tokens_G, a, b)
            return r + 1 - first_G[g]
    return -1


@njit(cache=True, nogil=True)
def search(state, first_G, time_G, tokens_G, a, b, c, depth, fuel, thorough, whole_W, real_W):  # type: ignore[no-untyped-def]
    """:func:`shorten` from ``state``; a thorough search goes on from elsewhere while fuel is left.

    Starts have half of the fuel that is left: ``state``, whole experts spread over copies; then, in turn, the best so
    far with a copy of its busiest GPU served elsewhere.
    Leaves the best tokens in ``state``; the totals are of the last try. Returns the time of the best.
    """
    tokens_M = state.tokens_M
    copies = len(tokens_M)
    best_M, rest_W = whole_W[:copies], whole_W[copies:]
    time, tokens = _highest(time_G, tokens_G)
    low_time, low_tokens = least_totals(state, first_G, time_G, tokens_G, a, b, rest_W)
    best, low = time + c * tokens, low_time + c * low_tokens
    least = max(1.001 * low, low + ENOUGH * (best - low))
    for r in range(copies):
        best_M[r] = tokens_M[r]
    start, moved = 0, 0
    while fuel > 0 and best > least and (thorough or start == 0):
        given = max(fuel // 2, 1) if thorough else fuel
        if start == 1:
            spread(state, time_G, tokens_G, a, b, c, rest_W)
        elif start > 1:
            given = min(fuel, TRY)
            _restore(best_M, state, time_G, tokens_G, a, b)
            moved = _disturb(moved, state, first_G, time_G, tokens_G, a, b, c)
            if moved < 0:
                break
        reached, left = shorten(
            state, first_G, time_G, tokens_G, low_time, low_tokens, least, a, b, c, depth, given, start < 2, rest_W,
            real_W,
        )  # fmt: skip
        fuel -= given - max(left, 0)
        if reached < best * (1 - 1e-9):
            best, moved = reached, 0
            for r in range(copies):
                best_M[r] = tokens_M[r]
        start += 1
    for r in range(copies):
        tokens_M[r] = best_M[r]
    return best
