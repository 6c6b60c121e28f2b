"""Compiled search for extras whose shares are fixed ahead, and the splitting of tokens by such shares.

Axes: C scenarios, E experts, G GPUs, X copies (primaries of ascending experts first), R replicas, S source ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeless.contracts import BoolArray, FloatArray, IntArray
from moeless.jit import njit
from moeless.placement.choose_kernels import late
from moeless.placement.dispatch_kernels import expected_seconds
from moeless.placement.plan_scoring import draw_scenarios

#: Parts of a copy's share that one step may hand on.
_PARTS = (1.0, 0.75, 0.5, 0.25)
#: Steps per extra, at most.
_STEPS = 8
#: Where source ranks begin to count: golden-section steps, so that their roundings do not add up.
_GOLDEN = 0.6180339887498949
#: Shares and tokens below this are none.
TINY = 1e-9
#: Part of the time that a step has to save.
LEAST = 1e-6


@njit(cache=True, nogil=True)
def _leaders(value_CG, top_C3, first_C3):  # type: ignore[no-untyped-def]
    """Of each scenario the three largest values and their GPUs."""
    for i in range(value_CG.shape[0]):
        top_C3[i, :] = 0.0
        first_C3[i, :] = -1
        for g in range(value_CG.shape[1]):
            v = value_CG[i, g]
            for k in range(3):
                if first_C3[i, k] < 0 or v > top_C3[i, k]:
                    for m in range(2, k, -1):
                        top_C3[i, m], first_C3[i, m] = top_C3[i, m - 1], first_C3[i, m - 1]
                    top_C3[i, k], first_C3[i, k] = v, g
                    break


@njit(cache=True, nogil=True, inline="always")
def _beside(top_C3, first_C3, i, g, h):  # type: ignore[no-untyped-def]
    """The largest value of a scenario on any GPU but g and h."""
    for k in range(3):
        if first_C3[i, k] >= 0 and first_C3[i, k] != g and first_C3[i, k] != h:
            return top_C3[i, k]
    return 0.0


@njit(cache=True, nogil=True, inline="always")
def _busy(n, a, b):  # type: ignore[no-untyped-def]
    return max(a * n, b) if n > TINY else 0.0


@njit(cache=True, nogil=True)
def shared_seconds(load_CE, expert_X, gpu_X, share_X, a, b, c, time_CG, tokens_CG):  # type: ignore[no-untyped-def]
    """Mean time of copies with fixed shares over scenarios; fills each GPU's seconds and tokens."""
    time_CG[:] = 0.0
    tokens_CG[:] = 0.0
    total = 0.0
    for i in range(load_CE.shape[0]):
        for x in range(len(expert_X)):
            n = share_X[x] * load_CE[i, expert_X[x]]
            time_CG[i, gpu_X[x]] += _busy(n, a, b)
            tokens_CG[i, gpu_X[x]] += n
        total += time_CG[i].max() + c * tokens_CG[i].max()
    return total / len(load_CE)


class Search(NamedTuple):
    """The copies so far and what they cost: seconds and tokens of each GPU under each scenario, and their largest."""

    load_CE: IntArray
    expert_X: IntArray
    gpu_X: IntArray
    share_X: FloatArray
    at_EG: IntArray
    used_G: IntArray
    room_G: IntArray
    time_CG: FloatArray
    tokens_CG: FloatArray
    slowest_G: BoolArray
    top_C3: FloatArray
    first_C3: IntArray
    most_C3: FloatArray
    whose_C3: IntArray


@njit(cache=True, nogil=True)
def _best_part(at, count, spare, score, price, a, b, c):  # type: ignore[no-untyped-def]
    """The best step that hands a part of one copy's tokens to another GPU: its gain, the copy, the GPU, the part."""
    # taken out once: each time costs as much as a step of the loops
    load_CE, expert_X, gpu_X, share_X, at_EG, used_G, room_G, time_CG, tokens_CG = at[:9]
    slowest_G, top_C3, first_C3, most_C3, whose_C3 = at[9:]
    scenarios, num_gpus = time_CG.shape
    best, best_x, best_h, best_part = 0.0, -1, -1, 0.0
    for x in range(count):
        e, g, s = expert_X[x], gpu_X[x], share_X[x]
        if s <= TINY or not slowest_G[g]:
            continue
        for h in range(num_gpus):
            y = at_EG[e, h]
            if h == g or (y < 0 and (spare == 0 or used_G[h] >= room_G[h])):
                continue
            t, paid = (0.0, price) if y < 0 else (share_X[y], 0.0)
            for part in _PARTS:
                moved = part * s
                total, least = 0.0, score * (1 - LEAST) - paid - best
                for i in range(scenarios):
                    n = load_CE[i, e]
                    here = time_CG[i, g] - _busy(s * n, a, b) + _busy((s - moved) * n, a, b)
                    there = time_CG[i, h] - _busy(t * n, a, b) + _busy((t + moved) * n, a, b)
                    total += max(here, there, _beside(top_C3, first_C3, i, g, h)) / scenarios
                    if c > 0.0:
                        here, there = tokens_CG[i, g] - moved * n, tokens_CG[i, h] + moved * n
                        total += c * max(here, there, _beside(most_C3, whose_C3, i, g, h)) / scenarios
                    if total >= least:
                        break
                if total < least:
                    best, best_x, best_h, best_part = score - paid - total, x, h, part
    return best, best_x, best_h, best_part


@njit(cache=True, nogil=True)
def _best_swap(at, count, spare, score, price, a, b, c):  # type: ignore[no-untyped-def]
    """The best two copies to change places, -1 where none gain: a primary's place stays, what leaves it is an extra."""
    # taken out once: each time costs as much as a step of the loops
    load_CE, expert_X, gpu_X, share_X, at_EG, used_G, room_G, time_CG, tokens_CG = at[:9]
    slowest_G, top_C3, first_C3, most_C3, whose_C3 = at[9:]
    scenarios, experts = load_CE.shape
    best, best_x, best_y = 0.0, -1, -1
    for x in range(count):
        e, g, s = expert_X[x], gpu_X[x], share_X[x]
        if s <= TINY or not slowest_G[g]:
            continue
        for y in range(count):
            f, h, t = expert_X[y], gpu_X[y], share_X[y]
            if h == g or t <= TINY or at_EG[e, h] >= 0 or at_EG[f, g] >= 0:
                continue
            from_g, from_h = int(x < experts), int(y < experts)
            if from_g + from_h > spare:
                continue
            if used_G[h] + from_h > room_G[h] or used_G[g] + from_g > room_G[g]:
                continue
            paid = price * (from_g + from_h)
            total, least = 0.0, score * (1 - LEAST) - paid - best
            for i in range(scenarios):
                n, m = load_CE[i, e], load_CE[i, f]
                more = _busy(t * m, a, b) - _busy(s * n, a, b)
                here, there = time_CG[i, g] + more, time_CG[i, h] - more
                total += max(here, there, _beside(top_C3, first_C3, i, g, h)) / scenarios
                if c > 0.0:
                    more = t * m - s * n
                    here, there = tokens_CG[i, g] + more, tokens_CG[i, h] - more
                    total += c * max(here, there, _beside(most_C3, whose_C3, i, g, h)) / scenarios
                if total >= least:
                    break
            if total < least:
                best, best_x, best_y = score - paid - total, x, y
    return best_x, best_y


@njit(cache=True, nogil=True)
def _give(at, count, x, h, share):  # type: ignore[no-untyped-def]
    """Hand ``share`` of copy x to GPU h; returns the number of copies. An extra that nothing is left of goes."""
    e, experts = at.expert_X[x], len(at.at_EG)
    y = at.at_EG[e, h]
    if y < 0:
        y = count
        at.expert_X[y], at.gpu_X[y], at.share_X[y], at.at_EG[e, h] = e, h, 0.0, y
        at.used_G[h] += 1
        count += 1
    at.share_X[x] -= share
    at.share_X[y] += share
    if at.share_X[x] <= TINY:
        at.share_X[x] = 0.0
        if x >= experts:
            at.at_EG[e, at.gpu_X[x]] = -1
            at.used_G[at.gpu_X[x]] -= 1
            count -= 1
            if x != count:
                # the last copy takes its place
                at.expert_X[x], at.gpu_X[x], at.share_X[x] = at.expert_X[count], at.gpu_X[count], at.share_X[count]
                at.at_EG[at.expert_X[x], at.gpu_X[x]] = x
    return count


@njit(cache=True, nogil=True)
def fix_shares(load_CE, gpu_E, room_G, extra, a, b, c, economy, expert_X, gpu_X, share_X):  # type: ignore[no-untyped-def]
    """Extras and shares by steepest descent from static EP; returns the number of copies and their mean time.

    A step hands a part of one copy's tokens to another GPU, into a copy that is there or a new one; where no step
    gains, two copies change places. A new copy has to save ``economy`` of the time. The first E copies are the
    primaries, which may be left without any share.
    """
    scenarios, experts = load_CE.shape
    num_gpus = len(room_G)
    at = Search(
        load_CE, expert_X, gpu_X, share_X, np.full((experts, num_gpus), -1, np.int64), np.zeros(num_gpus, np.int64),
        room_G, np.empty((scenarios, num_gpus)), np.empty((scenarios, num_gpus)), np.empty(num_gpus, np.bool_),
        np.empty((scenarios, 3)), np.empty((scenarios, 3), np.int64), np.empty((scenarios, 3)),
        np.empty((scenarios, 3), np.int64),
    )  # fmt: skip
    for e in range(experts):
        expert_X[e], gpu_X[e], share_X[e] = e, gpu_E[e], 1.0
        at.at_EG[e, gpu_E[e]] = e
        at.used_G[gpu_E[e]] += 1
    count = experts
    score = shared_seconds(load_CE, expert_X[:count], gpu_X[:count], share_X[:count], a, b, c, at.time_CG, at.tokens_CG)
    for _ in range(_STEPS * extra):
        _leaders(at.time_CG, at.top_C3, at.first_C3)
        _leaders(at.tokens_CG, at.most_C3, at.whose_C3)
        at.slowest_G[:] = False
        for i in range(scenarios):
            at.slowest_G[at.first_C3[i, 0]] = True
            if c > 0.0:
                at.slowest_G[at.whose_C3[i, 0]] = True
        spare, price = extra - (count - experts), economy * score
        _, x, h, part = _best_part(at, count, spare, score, price, a, b, c)
        if x >= 0:
            count = _give(at, count, x, h, part * share_X[x])
        else:
            x, y = _best_swap(at, count, spare, score, price, a, b, c)
            if x < 0:
                break
            g, h = gpu_X[x], gpu_X[y]
            # the places that extras leave are free before others come; giving may renumber copies
            for z in (max(x, y), min(x, y)):
                if z >= experts:
                    to = h if z == x else g
                    at.at_EG[expert_X[z], gpu_X[z]], at.at_EG[expert_X[z], to] = -1, z
                    at.used_G[gpu_X[z]] -= 1
                    at.used_G[to] += 1
                    gpu_X[z] = to
            if x < experts:
                count = _give(at, count, x, h, share_X[x])
            if y < experts:
                count = _give(at, count, y, g, share_X[y])
        score = shared_seconds(
            load_CE, expert_X[:count], gpu_X[:count], share_X[:count], a, b, c, at.time_CG, at.tokens_CG
        )
    return count, score


@njit(cache=True, nogil=True)
def _fits(expert_P, gpu_P, share_P, terms):  # type: ignore[no-untyped-def]
    """Whether a previous plan, primaries first, has fixed shares and the room it takes is still there."""
    experts = len(terms.gpu_E)
    if len(share_P) < experts or len(share_P) > experts + terms.extra:
        return False
    used_G = np.zeros(len(terms.room_G), np.int64)
    for p in range(len(share_P)):
        used_G[gpu_P[p]] += 1
        if p < experts and (expert_P[p] != p or gpu_P[p] != terms.gpu_E[p]):
            return False
    full = True
    for g in range(len(used_G)):
        full = full and used_G[g] <= terms.room_G[g]
    return full


@njit(cache=True, nogil=True)
def weigh_fixed(  # type: ignore[no-untyped-def]
    mean_E, var_E, spread, normal_CE, terms, base_expert_R, base_gpu_R, expert_P, gpu_P, live_P, share_P, horizon,
    lead, copy_G, control, caution, margin, expert_R, gpu_R, share_R,
):  # fmt: skip
    """Copies with fixed shares where they beat static EP and the plan ``base``; returns their number, or 0.

    Args:
        base_expert_R, base_gpu_R: extras with dispatch after the gate, behind the primaries; its ``control`` counts.
        expert_P, gpu_P, live_P, share_P: the previous plan, primaries first where it has shares.
        caution: standard deviations of the gain, over scenarios, that are left out of it.
        margin: part of static EP's time that is left out of it besides.
    """
    a, b, c, gpu_E, experts = terms.a, terms.b, terms.c, terms.gpu_E, len(terms.gpu_E)
    num_gpus = len(terms.room_G)
    if mean_E.max() <= 0.0:
        return 0
    load_CE = np.empty(normal_CE.shape, np.int64)
    load_CE = load_CE[: draw_scenarios(mean_E, var_E, spread, normal_CE, load_CE)]
    # judged on other loads than those that the shares are fitted to: noise that was fitted is no gain
    fit_CE = load_CE[: (len(load_CE) + 1) // 2]
    load_CE = load_CE[len(load_CE) // 2 :]
    scenarios = len(load_CE)
    time_CG, tokens_CG = np.empty((scenarios, num_gpus)), np.empty((scenarios, num_gpus))
    plain_C, gain_C = np.empty(scenarios), np.empty(scenarios)
    one_E = np.ones(experts)
    shared_seconds(load_CE, base_expert_R[:experts], base_gpu_R[:experts], one_E, a, b, c, time_CG, tokens_CG)
    for i in range(scenarios):
        plain_C[i] = time_CG[i].max() + c * tokens_CG[i].max()
    other = 0.0
    if len(base_expert_R) > experts:
        static, dispatched = expected_seconds(
            load_CE, base_expert_R, base_gpu_R, num_gpus, a, b, c, terms.depth, terms.fuel
        )
        other = max(static - dispatched - control, 0.0)
    count, _ = fix_shares(fit_CE, gpu_E, terms.room_G, terms.extra, a, b, c, terms.economy, expert_R, gpu_R, share_R)
    delay = 0.0
    if len(expert_P) > 0:
        delay = late(expert_R[experts:count], gpu_R[experts:count], expert_P, gpu_P, live_P, copy_G, lead)
    if _fits(expert_P, gpu_P, share_P, terms):
        reached = shared_seconds(load_CE, expert_R[:count], gpu_R[:count], share_R[:count], a, b, c, time_CG, tokens_CG)
        kept = shared_seconds(load_CE, expert_P, gpu_P, share_P, a, b, c, time_CG, tokens_CG)
        if (kept - reached) * horizon <= delay - late(
            expert_P[experts:], gpu_P[experts:], expert_P, gpu_P, live_P, copy_G, lead
        ):
            count, delay = len(expert_P), 0.0
            expert_R[:count], gpu_R[:count], share_R[:count] = expert_P, gpu_P, share_P
    if count == experts:
        return 0
    shared_seconds(load_CE, expert_R[:count], gpu_R[:count], share_R[:count], a, b, c, time_CG, tokens_CG)
    for i in range(scenarios):
        gain_C[i] = plain_C[i] - time_CG[i].max() - c * tokens_CG[i].max()
    ahead = gain_C.mean() - caution * gain_C.std() - margin * plain_C.mean() - other
    return count if ahead > 0.0 and ahead * horizon > delay else 0


@njit(cache=True, nogil=True)
def source_start(s):  # type: ignore[no-untyped-def]
    """The fraction of a token at which source rank s starts to count."""
    return (s * _GOLDEN) % 1.0


@njit(cache=True, nogil=True)
def share_bound(done, tokens, start):  # type: ignore[no-untyped-def]
    """How many of a source's tokens go to the copies that have ``done`` of the expert's share together."""
    # the last copy's bound is the whole, whatever the rounding of shares
    return tokens if done >= 1.0 - TINY else min(np.int64(np.floor(done * tokens + start)), tokens)


@njit(cache=True, nogil=True)
def split_by_shares(load_SE, expert_R, primary_R, share_R, serving_R, quota_SR):  # type: ignore[no-untyped-def]
    """Each source rank's tokens over the serving copies by their shares, knowing no other rank's counts.

    Of n tokens a copy gets its share within one token, and so do the totals nearly: rank s starts to count at its own
    fraction of a token. Where the serving copies have no share, the primary (else the first of them) takes all.
    """
    num_sources, num_experts = load_SE.shape
    whole_E, home_E = np.zeros(num_experts), np.full(num_experts, -1, np.int64)
    for r in range(len(expert_R)):
        if serving_R[r]:
            whole_E[expert_R[r]] += share_R[r]
            if home_E[expert_R[r]] < 0 or primary_R[r]:
                home_E[expert_R[r]] = r
    done_E, last_E = np.empty(num_experts), np.empty(num_experts, np.int64)
    quota_SR[:] = 0
    for s in range(num_sources):
        start = source_start(s)
        done_E[:] = 0.0
        last_E[:] = 0
        for r in range(len(expert_R)):
            e = expert_R[r]
            if not serving_R[r] or whole_E[e] <= TINY:
                continue
            done_E[e] += share_R[r] / whole_E[e]
            bound = share_bound(done_E[e], load_SE[s, e], start)
            quota_SR[s, r] = bound - last_E[e]
            last_E[e] = bound
        for e in range(num_experts):
            if whole_E[e] <= TINY and home_E[e] >= 0:
                quota_SR[s, home_E[e]] = load_SE[s, e]
