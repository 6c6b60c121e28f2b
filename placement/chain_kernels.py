"""State of the compiled search for the tokens of each copy, and where a search can start.

A layer's time is ``max_g time_g + c max_g tokens_g``: a GPU's time is the sum over its used copies of
``max(a n, b)`` for n tokens, its tokens are what it exchanges.

Only *movable* copies take part: loaded experts with more than one usable copy. What stays is in the GPUs' totals.
Axes: M movable copies sorted by GPU, G GPUs, W a search's working memory. The ring ``state[NEXT]`` links the copies
of an expert.
"""

from __future__ import annotations

from moeless.jit import njit

#: Rows of the state: tokens, GPU and next copy of each movable copy.
TOKENS, GPU, NEXT = 0, 1, 2


@njit(cache=True, nogil=True, inline="always")
def _busy(n, a, b):  # type: ignore[no-untyped-def]
    return max(a * n, b) if n > 0 else 0.0


@njit(cache=True, nogil=True, inline="always")
def _move(r, q, m, state, time_G, tokens_G, a, b):  # type: ignore[no-untyped-def]
    g, h, n, k = state[GPU, r], state[GPU, q], state[TOKENS, r], state[TOKENS, q]
    time_G[g] += _busy(n - m, a, b) - _busy(n, a, b)
    time_G[h] += _busy(k + m, a, b) - _busy(k, a, b)
    tokens_G[g] -= m
    tokens_G[h] += m
    state[TOKENS, r] = n - m
    state[TOKENS, q] = k + m


@njit(cache=True, nogil=True)
def gather(state, time_G, tokens_G, a, b):  # type: ignore[no-untyped-def]
    """Take all movable tokens off the GPUs: each expert's total to its first copy, the GPUs' totals without them."""
    for r in range(state.shape[1]):
        n = state[TOKENS, r]
        if n > 0:
            g = state[GPU, r]
            time_G[g] -= _busy(n, a, b)
            tokens_G[g] -= n
    for r in range(state.shape[1]):
        q = state[NEXT, r]
        while q > r:
            state[TOKENS, r] += state[TOKENS, q]
            state[TOKENS, q] = 0
            q = state[NEXT, q]


@njit(cache=True, nogil=True)
def spread(state, time_G, tokens_G, a, b, c, variant, order_M):  # type: ignore[no-untyped-def]
    """Serve each movable expert whole, the largest first, by its copy on the least busy GPU.

    Variants above 0 take the experts in another order, of which the size is still the larger part.
    """
    gather(state, time_G, tokens_G, a, b)
    for r in range(state.shape[1]):
        order_M[r] = state[TOKENS, r] * (16 + (r * 7 + 3) * variant % 17)
    while True:
        first, most = -1, 0
        for r in range(state.shape[1]):
            if order_M[r] > most:
                first, most = r, order_M[r]
        if first < 0:
            return
        order_M[first] = 0
        n, to = state[TOKENS, first], first
        least = time_G[state[GPU, first]] + c * tokens_G[state[GPU, first]]
        q = state[NEXT, first]
        while q != first:
            h = state[GPU, q]
            if time_G[h] + c * tokens_G[h] < least:
                to, least = q, time_G[h] + c * tokens_G[h]
            q = state[NEXT, q]
        state[TOKENS, first] = 0
        state[TOKENS, to] = n
        h = state[GPU, to]
        time_G[h] += _busy(n, a, b)
        tokens_G[h] += n
