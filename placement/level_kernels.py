"""Compiled levelling of GPUs, pair of copies by pair of copies, and the least that GPUs can be levelled to.

Axes: M movable copies sorted by GPU, G GPUs.
"""

from __future__ import annotations

from moeless.jit import njit
from moeless.placement.chain_kernels import _busy, _move


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
