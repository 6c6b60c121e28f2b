"""Compiled search for the tokens of each copy: shed load from overfull GPUs along chains of copies.

A layer's time is ``max_g time_g + c max_g tokens_g``: a GPU's time is the sum over its used copies of
``max(a n, b)`` for n tokens, its tokens are what it exchanges. For a pair of limits (time, tokens) every GPU above
either sheds tokens to other copies of its experts: whole experts where the weight read b decides, part of them where
tokens decide; where the receiver overflows, it sheds in turn (an augmenting path, exact for unit costs and for costs
linear in tokens). The limits are lowered together, then one at the other's expense.

Only *movable* copies take part: loaded experts with more than one usable copy. What stays is in the GPUs' totals.
Axes: M movable copies sorted by GPU, G GPUs, X moves. ``next_M`` links the copies of an expert in a ring.
"""

from __future__ import annotations

import numpy as np

from moeless.jit import njit

#: Rows of the state that travels through the recursion.
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
def _shed(g, limit, most, depth, state, time_G, tokens_G, first_G, visited, log, counter, a, b, c):  # type: ignore[no-untyped-def]
    """Bring GPU g to ``limit`` seconds and ``most`` tokens; returns whether that succeeded.

    ``log`` keeps every move made, so that a chain that fails is taken back; ``counter`` is (moves, fuel).
    """
    eps, per_token = 1e-9 * limit, 1.0 / a
    visited[g] = True
    first, stop = first_G[g], first_G[g + 1]
    while time_G[g] > limit + eps or tokens_G[g] > most:
        over, many = max(time_G[g] - limit, 0.0), max(tokens_G[g] - most, 0)
        wanted = max(int(np.ceil(over * per_token - 1e-9)), many)
        # the move that helps most for what it wastes
        best_score, best_r, best_q, best_m = 0.0, -1, -1, 0
        for r in range(first, stop):
            n = state[TOKENS, r]
            if n == 0:
                continue
            counter[1] -= 1
            here = _busy(n, a, b)
            q = state[NEXT, r]
            while q != r:
                h, k = state[GPU, q], state[TOKENS, q]
                there = _busy(k, a, b)
                room = limit - time_G[h] + there
                if h != g and room >= b:
                    fits = min(min(int(room * per_token + 1e-9) - k, most - tokens_G[h]), n)
                    if fits > 0:
                        gain = here - _busy(n - fits, a, b)
                        waste = max(_busy(k + fits, a, b) - there - gain, 0.0)
                        score = min(gain, over) + c * min(fits, many) - 0.5 * waste
                        if score > best_score:
                            best_score, best_r, best_q, best_m = score, r, q, fits
                        if wanted < fits:
                            gain = here - _busy(n - wanted, a, b)
                            waste = max(_busy(k + wanted, a, b) - there - gain, 0.0)
                            score = min(gain, over) + c * min(wanted, many) - 0.5 * waste
                            if score > best_score or (score == best_score and best_r >= 0 and wanted < best_m):
                                best_score, best_r, best_q, best_m = score, r, q, wanted
                q = state[NEXT, q]
        if best_r >= 0:
            if counter[0] >= log.shape[0]:
                break
            log[counter[0], 0], log[counter[0], 1], log[counter[0], 2] = best_r, best_q, best_m
            counter[0] += 1
            _move(best_r, best_q, best_m, state, time_G, tokens_G, a, b)
            continue
        if depth == 0 or counter[1] < 0:
            break
        helped = False
        for r in range(first, stop):
            n = state[TOKENS, r]
            if n == 0:
                continue
            q = state[NEXT, r]
            while q != r and not helped:
                h = state[GPU, q]
                if not visited[h]:
                    for option in range(2):
                        m = n if option == 0 else min(wanted, n)
                        if (option == 1 and m == n) or counter[0] >= log.shape[0]:
                            break
                        before_time, before_tokens, mark = time_G[g], tokens_G[g], counter[0]
                        log[mark, 0], log[mark, 1], log[mark, 2] = r, q, m
                        counter[0] += 1
                        _move(r, q, m, state, time_G, tokens_G, a, b)
                        if many > 0 or time_G[g] < before_time - eps:
                            if not _shed(
                                h, limit, most, depth - 1, state, time_G, tokens_G, first_G, visited, log, counter,
                                a, b, c,
                            ):  # fmt: skip
                                # keep what the receiver could pass on, take the rest back
                                excess = max(int(np.ceil((time_G[h] - limit) * per_token - 1e-9)), tokens_G[h] - most)
                                back = min(min(excess, state[TOKENS, q]), m)
                                _move(q, r, back, state, time_G, tokens_G, a, b)
                                log[mark, 2] = m - back
                            if (time_G[h] <= limit + eps and tokens_G[h] <= most) and (
                                (over > 0 and time_G[g] < before_time - eps)
                                or (many > 0 and tokens_G[g] < before_tokens)
                            ):
                                helped = True
                                break
                        while counter[0] > mark:
                            counter[0] -= 1
                            at = counter[0]
                            _move(log[at, 1], log[at, 0], log[at, 2], state, time_G, tokens_G, a, b)
                q = state[NEXT, q]
            if helped:
                break
        if not helped:
            break
    visited[g] = False
    return time_G[g] <= limit + eps and tokens_G[g] <= most


@njit(cache=True, nogil=True)
def balance(state, first_G, time_G, tokens_G, a, b, c, depth, fuel):  # type: ignore[no-untyped-def]
    """Lower the layer's time from ``state``, in place; returns the time reached.

    Args:
        state: tokens, GPU and next copy of each movable copy, ``[3, M]``.
        first_G: ``first_G[g] .. first_G[g + 1]`` are GPU g's movable copies.
        time_G, tokens_G: totals of each GPU, movable copies included.
        depth: GPUs that a chain may pass on.
        fuel: copies examined before the search stops.
    """
    num_gpus = len(first_G) - 1
    low_time, low_tokens = time_G.sum() / num_gpus, (tokens_G.sum() + num_gpus - 1) // num_gpus
    for g in range(num_gpus):
        time, tokens = time_G[g], tokens_G[g]
        for r in range(first_G[g], first_G[g + 1]):
            time -= _busy(state[TOKENS, r], a, b)
            tokens -= state[TOKENS, r]
        low_time, low_tokens = max(low_time, time), max(low_tokens, tokens)
    best_time, best_tokens = time_G.max(), tokens_G.max()
    visited = np.zeros(num_gpus, np.bool_)
    log = np.empty((4 * state.shape[1] + 8, 3), np.int64)
    counter = np.zeros(2, np.int64)
    counter[1] = fuel
    slice_ = max(fuel // 16, 1)
    share, mode, failed = 0.5, 0, 0
    while counter[1] > 0 and failed < 3:
        gap_time, gap_tokens = max(best_time - low_time, 0.0), max(best_tokens - low_tokens, 0)
        if gap_time + c * gap_tokens < 1e-3 * best_time:
            break
        limit, most = best_time - share * gap_time, best_tokens - int(share * gap_tokens)
        if mode == 1:
            most = best_tokens + (int(0.9 * share * gap_time / c) if c > 0 else best_tokens)
        elif mode == 2:
            limit = best_time + 0.9 * c * share * gap_tokens
        # a test that cannot be met must not eat the fuel of the others
        rest = max(counter[1] - slice_, 0)
        counter[0], counter[1] = 0, min(counter[1], slice_)
        met = True
        for g in range(num_gpus):
            if (time_G[g] > limit * (1 + 1e-9) or tokens_G[g] > most) and not _shed(
                g, limit, most, depth, state, time_G, tokens_G, first_G, visited, log, counter, a, b, c
            ):
                met = False
                break
        time, tokens = time_G.max(), tokens_G.max()
        better = time + c * tokens < (best_time + c * best_tokens) * (1 - 1e-9)
        if better:
            best_time, best_tokens, failed = time, tokens, 0
        else:
            while counter[0] > 0:
                counter[0] -= 1
                at = counter[0]
                _move(log[at, 1], log[at, 0], log[at, 2], state, time_G, tokens_G, a, b)
        counter[1] += rest
        if not met or not better:
            share *= 0.5
        if share < 0.03:
            share = 1.0
            mode = (mode + 1) % 3
            failed += 1
    return best_time + c * best_tokens
