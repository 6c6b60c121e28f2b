"""State of the compiled search for the tokens of each copy, and where a search can start.

A layer's time is ``max_g time_g + c max_g tokens_g``: a GPU's time is the sum over its used copies of
``max(a n, b)`` for n tokens, its tokens are what it exchanges.

Only *movable* copies take part: loaded experts with more than one usable copy. What stays is in the GPUs' totals.
Axes: M movable copies sorted by GPU, G GPUs, W a search's working memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeless.contracts import IntArray
from moeless.jit import njit

#: Copies up to which the next largest is looked for rather than sorted out.
FEW = 96


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
