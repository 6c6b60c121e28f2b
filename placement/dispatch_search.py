"""Compiled search for the tokens of each copy: level GPUs, then shed load along the shortest chains of copies.

A layer's time is the most seconds of any GPU plus ``exchange_seconds`` for the most tokens of any GPU: a GPU's seconds
are the sum over its used copies of ``max(token_seconds * tokens, floor_seconds)``, its tokens are what it exchanges.
Only *movable* copies take part: loaded experts with more than one usable copy. What stays is in the GPUs' load.

For a pair of limits (seconds, tokens), a first pass lowers the squared excess over them pair by pair, which settles
what is continuous; then each GPU above a limit sheds by the best direct move or by a labelled path (each GPU keeps the
least excess with which a chain reaches it), which may close at the GPU it started from: a swap. The limits are lowered
together, then one at the other's expense. What is stuck from one start is tried again from others, and from the best
so far with one copy of its busiest GPU served elsewhere.

Steps of the search are compiled into it: handing their many arrays over took a quarter of the time.
Axes: M movable copies sorted by GPU, G GPUs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import FloatArray, IntArray
from moeless.jit import njit

#: Part of the room over the least time that is not worth a search.
ENOUGH = 0.01
#: Fuel of each try from the best with a copy served elsewhere.
TRY = 100
#: Relative difference below which two times are the same.
SAME = 1e-9
#: No copy, no GPU; none of the tokens. NumPy's integers, because numba compiles a function anew for every Python
#: constant that it is called with, even where that is only what a variable is before a loop.
_NONE: Any = np.int64(-1)
_ZERO: Any = np.int64(0)
#: What is lowered: both limits, or one at the expense of the other.
_BOTH, _SECONDS_ONLY, _TOKENS_ONLY = 0, 1, 2
#: Rows of a label: excess, then seconds and tokens of the chain's first GPU after its first move.
_EXCESS, _SECONDS, _TOKENS = 0, 1, 2
#: Rows of a label's way: copies and tokens of its last move, GPUs passed on (negative once gone on from).
_FROM, _TO, _MOVED, _HOPS = 0, 1, 2, 3


class Rates(NamedTuple):
    """A cost model as the search takes it: seconds per token, of reading an expert's weights, per token exchanged."""

    token_seconds: float
    floor_seconds: float
    exchange_seconds: float


class GpuLoad(NamedTuple):
    """Seconds and tokens of each GPU, movable copies included."""

    seconds_G: FloatArray
    tokens_G: IntArray


class MovableCopies(NamedTuple):
    """Tokens, GPU and next copy of each movable copy; the ring of next copies links those of an expert.

    GPU g's copies are ``first_G[g]`` to ``first_G[g + 1]``, ``[G + 1]``. GPUs and next copies are unsigned: compiled
    code then need not ask whether they count from the end.
    """

    tokens_M: IntArray
    gpu_M: NDArray[np.uint32]
    next_M: NDArray[np.uint32]
    first_G: IntArray


class Limits(NamedTuple):
    """What no GPU should exceed, or what some GPU has at least."""

    seconds: float
    tokens: int


class SearchMemory(NamedTuple):
    """What a search works in, beside its copies: tokens and loads to go back to, an order, labels of GPUs."""

    best_M: IntArray
    kept_M: IntArray
    order_M: IntArray
    kept_seconds_G: FloatArray
    kept_tokens_G: IntArray
    label_3G: FloatArray
    way_4G: IntArray
    queue_G: IntArray


@njit(cache=True, nogil=True)
def search_memory(copies: int, num_gpus: int) -> SearchMemory:
    """Enough for searches with up to so many movable copies."""
    tokens_3M, whole_2G = np.empty((3, copies), np.int64), np.empty((2, num_gpus), np.int64)
    return SearchMemory(
        tokens_3M[0], tokens_3M[1], tokens_3M[2], np.empty(num_gpus), whole_2G[0], np.empty((3, num_gpus)),
        np.empty((4, num_gpus), np.int64), whole_2G[1],
    )  # fmt: skip


@njit(cache=True, nogil=True, allocates=False, inner=True)
def busy_seconds(tokens: int, rates: Rates) -> float:
    """Seconds of a copy; one without tokens is not used and takes none."""
    return max(rates.token_seconds * tokens, rates.floor_seconds) if tokens > 0 else 0.0


@njit(cache=True, nogil=True, allocates=False, forceinline=True, inner=True)
def _move(source: int, target: np.int64, moved: int, copies: MovableCopies, load: GpuLoad, rates: Rates) -> None:
    """Hand tokens of one copy to another of the same expert."""
    gpu, target_gpu = copies.gpu_M[source], copies.gpu_M[target]
    tokens, target_tokens = copies.tokens_M[source], copies.tokens_M[target]
    load.seconds_G[gpu] += busy_seconds(tokens - moved, rates) - busy_seconds(tokens, rates)
    load.seconds_G[target_gpu] += busy_seconds(target_tokens + moved, rates) - busy_seconds(target_tokens, rates)
    load.tokens_G[gpu] -= moved
    load.tokens_G[target_gpu] += moved
    copies.tokens_M[source] = tokens - moved
    copies.tokens_M[target] = target_tokens + moved


@njit(cache=True, nogil=True, allocates=False)
def serve_whole(copies: MovableCopies, load: GpuLoad, rates: Rates, order_M: IntArray) -> None:
    """Serve each movable expert whole, the largest first, by its copy on the least busy GPU."""
    tokens_M, gpu_M, next_M, _ = copies
    seconds_G, tokens_G = load
    for r in range(len(tokens_M)):
        if tokens_M[r] > 0:
            seconds_G[gpu_M[r]] -= busy_seconds(tokens_M[r], rates)
            tokens_G[gpu_M[r]] -= tokens_M[r]
    # an expert's tokens all to its first copy; these by tokens, ties to the lowest index
    experts = 0
    for r in range(len(tokens_M)):
        other = next_M[r]
        while other > r:
            tokens_M[r] += tokens_M[other]
            tokens_M[other] = 0
            other = next_M[other]
        if tokens_M[r] > 0:
            at = experts
            while at > 0 and tokens_M[order_M[at - 1]] < tokens_M[r]:
                order_M[at] = order_M[at - 1]
                at -= 1
            order_M[at] = r
            experts += 1
    for i in range(experts):
        first = order_M[i]
        tokens, to = tokens_M[first], first
        least = seconds_G[gpu_M[first]] + rates.exchange_seconds * tokens_G[gpu_M[first]]
        other = next_M[first]
        while other != first:
            time = seconds_G[gpu_M[other]] + rates.exchange_seconds * tokens_G[gpu_M[other]]
            if time < least:
                to, least = np.int64(other), time
            other = next_M[other]
        tokens_M[first] = 0
        tokens_M[to] = tokens
        seconds_G[gpu_M[to]] += busy_seconds(tokens, rates)
        tokens_G[gpu_M[to]] += tokens


@njit(cache=True, nogil=True, allocates=False)
def least_load(copies: MovableCopies, load: GpuLoad, rates: Rates, root_G: IntArray) -> Limits:
    """What the GPU with most seconds, and that with most tokens, has at least, whatever becomes of movable tokens.

    GPUs that no movable expert links, directly or over others, share nothing: each group keeps its sum, and so at
    least its mean. ``copies`` must not split experts. ``root_G`` is working memory.
    """
    tokens_M, gpu_M, next_M, first_G = copies
    num_gpus = len(root_G)
    for g in range(num_gpus):
        root_G[g] = g
    for r in range(len(tokens_M)):
        root, other = root_G[gpu_M[r]], root_G[gpu_M[next_M[r]]]
        if root != other:
            for g in range(num_gpus):
                if root_G[g] == other:
                    root_G[g] = root
    least_seconds, least_tokens = 0.0, 0
    for g in range(num_gpus):
        fixed_seconds, fixed_tokens = load.seconds_G[g], load.tokens_G[g]
        for r in range(first_G[g], first_G[g + 1]):
            fixed_seconds -= busy_seconds(tokens_M[r], rates)
            fixed_tokens -= tokens_M[r]
        least_seconds, least_tokens = max(least_seconds, fixed_seconds), max(least_tokens, fixed_tokens)
        if root_G[g] == g:
            size, seconds, tokens = 0, 0.0, 0
            for h in range(num_gpus):
                if root_G[h] == g:
                    size += 1
                    seconds += load.seconds_G[h]
                    tokens += load.tokens_G[h]
            least_seconds = max(least_seconds, seconds / size)
            least_tokens = max(least_tokens, (tokens + size - 1) // size)
    return Limits(least_seconds, least_tokens)


@njit(cache=True, nogil=True, allocates=False, forceinline=True, inner=True)
def _squared_excess(
    seconds: float, other_seconds: float, tokens: int, other_tokens: int, limits: Limits, exchange_seconds: float
) -> float:
    """Squared excess of two GPUs over the limits; ties go to less time in all."""
    over, other_over = max(seconds - limits.seconds, 0.0), max(other_seconds - limits.seconds, 0.0)
    many = exchange_seconds * max(tokens - limits.tokens, 0)
    other_many = exchange_seconds * max(other_tokens - limits.tokens, 0)
    tie = 1e-5 * limits.seconds * (seconds + other_seconds)
    return over * over + other_over * other_over + many * many + other_many * other_many + tie


@njit(cache=True, nogil=True, allocates=False, forceinline=True, inner=True)
def _level(copies: MovableCopies, load: GpuLoad, rates: Rates, limits: Limits, sweeps: int, fuel: int) -> int:
    """Move tokens between copies where that lowers the squared excess over the limits; returns pairs examined."""
    tokens_M, gpu_M, next_M, _ = copies
    per_token, floor, per_exchange = rates
    floor_tokens, weight = floor / per_token, 0.5 / (per_token + per_exchange)
    examined = 0
    for _ in range(sweeps):
        changed = False
        for r in range(len(tokens_M)):
            gpu = gpu_M[r]
            other = next_M[r]
            while other != r:
                h = gpu_M[other]
                seconds, other_seconds = load.seconds_G[gpu], load.seconds_G[h]
                load_tokens, other_load = load.tokens_G[gpu], load.tokens_G[h]
                above = max(seconds, other_seconds) > limits.seconds or max(load_tokens, other_load) > limits.tokens
                if other > r and above:
                    tokens, other_tokens = tokens_M[r], tokens_M[other]
                    both = tokens + other_tokens
                    # the two GPUs without this pair of copies
                    here = seconds - busy_seconds(tokens, rates)
                    there = other_seconds - busy_seconds(other_tokens, rates)
                    few, other_few = load_tokens - tokens, other_load - other_tokens
                    whole = max(per_token * both, floor)
                    examined += 1
                    least = _squared_excess(seconds, other_seconds, load_tokens, other_load, limits, per_exchange)
                    least *= 1 - SAME
                    keep = tokens
                    value = _squared_excess(here, there + whole, few, other_few + both, limits, per_exchange)
                    if value < least:
                        least, keep = value, 0
                    value = _squared_excess(here + whole, there, few + both, other_few, limits, per_exchange)
                    if value < least:
                        least, keep = value, both
                    if both > floor_tokens:
                        even = (there - here + per_exchange * (other_few - few)) * weight + 0.5 * both
                        low, high = min(floor_tokens, both - floor_tokens), max(floor_tokens, both - floor_tokens)
                        part = int(min(max(even, low), high))
                        rest = both - part
                        value = _squared_excess(
                            here + max(per_token * part, floor), there + max(per_token * rest, floor), few + part,
                            other_few + rest, limits, per_exchange,
                        )  # fmt: skip
                        if value < least:
                            least, keep = value, part
                    if keep != tokens:
                        _move(r, np.int64(other), tokens - keep, copies, load, rates)
                        changed = True
                other = next_M[other]
            if examined > fuel:
                return examined
        if not changed:
            break
    return examined


@njit(cache=True, nogil=True, allocates=False, forceinline=True, inner=True)
def _shed_directly(gpu: int, copies: MovableCopies, load: GpuLoad, rates: Rates, limits: Limits) -> bool:
    """Make the one move off a GPU that helps most for what it wastes; returns whether there was any."""
    tokens_M, gpu_M, next_M, first_G = copies
    tokens_per_second = 1.0 / rates.token_seconds
    over, many = max(load.seconds_G[gpu] - limits.seconds, 0.0), max(load.tokens_G[gpu] - limits.tokens, 0)
    wanted = max(int(np.ceil(over * tokens_per_second - 1e-9)), many)
    best, best_source, best_target, best_moved = 0.0, _NONE, _NONE, _ZERO
    for r in range(first_G[gpu], first_G[gpu + 1]):
        tokens = tokens_M[r]
        if tokens == 0:
            continue
        here = busy_seconds(tokens, rates)
        other = next_M[r]
        while other != r:
            h, other_tokens = gpu_M[other], tokens_M[other]
            there = busy_seconds(other_tokens, rates)
            room = limits.seconds - load.seconds_G[h] + there
            if h != gpu and room >= rates.floor_seconds:
                fits = int(room * tokens_per_second + 1e-9) - other_tokens
                fits = min(min(fits, limits.tokens - load.tokens_G[h]), tokens)
                for option in range(2):
                    moved = fits if option == 0 else wanted
                    if moved <= 0 or moved > fits or (option == 1 and moved == fits):
                        continue
                    gain = here - busy_seconds(tokens - moved, rates)
                    waste = max(busy_seconds(other_tokens + moved, rates) - there - gain, 0.0)
                    score = min(gain, over) + rates.exchange_seconds * min(moved, many) - 0.5 * waste
                    if score > best or (score == best and best_source >= 0 and moved < best_moved):
                        best, best_source, best_target, best_moved = score, r, np.int64(other), moved
            other = next_M[other]
    if best_source < 0:
        return False
    _move(best_source, best_target, best_moved, copies, load, rates)
    return True


@njit(cache=True, nogil=True, allocates=False, forceinline=True, inner=True)
def _shed_by_chain(
    root: int, copies: MovableCopies, load: GpuLoad, rates: Rates, limits: Limits, depth: int, memory: SearchMemory
) -> tuple[bool, int]:
    """Lower GPU ``root`` by one chain of moves that leaves every other GPU within the limits.

    Returns whether there was one, and the pairs of copies examined.
    """
    tokens_M, gpu_M, next_M, first_G = copies
    label_3G, way_4G, queue_G = memory.label_3G, memory.way_4G, memory.queue_G
    tokens_per_second, slack = 1.0 / rates.token_seconds, 1e-9 * limits.seconds
    per_exchange, floor = rates.exchange_seconds, rates.floor_seconds
    for g in range(len(queue_G)):
        label_3G[_EXCESS, g], way_4G[_HOPS, g] = np.inf, -1
    way_4G[_HOPS, root], queue_G[0] = 0, root
    head, tail, examined = 0, 1, 0
    # the chain's last move: off which GPU, between which copies, how many tokens
    last, last_source, last_target, last_moved = _NONE, _NONE, _NONE, _ZERO
    before = max(load.seconds_G[root] - limits.seconds, 0.0)
    before += per_exchange * max(load.tokens_G[root] - limits.tokens, 0)
    while head < tail and last < 0:
        gpu = queue_G[head]
        head += 1
        over, many, arrived = load.seconds_G[gpu] - limits.seconds, load.tokens_G[gpu] - limits.tokens, -1
        if gpu != root:
            arrived = way_4G[_TO, gpu]
            tokens, moved = tokens_M[arrived], way_4G[_MOVED, gpu]
            over += busy_seconds(tokens + moved, rates) - busy_seconds(tokens, rates)
            many += moved
        hops = way_4G[_HOPS, gpu]
        way_4G[_HOPS, gpu] = -2
        for r in range(first_G[gpu], first_G[gpu + 1]):
            tokens = tokens_M[r]
            if tokens == 0 or r == arrived or last >= 0:
                continue
            here = busy_seconds(tokens, rates)
            # the fewest tokens that bring this GPU within the limits
            need = max(many, 0)
            if over > slack:
                rest = here - over
                need = max(need, tokens if rest < floor - slack else tokens - int(rest * tokens_per_second + 1e-9))
            enough = 0 < need <= tokens and here - busy_seconds(tokens - need, rates) >= over - slack
            if not enough and gpu != root:
                continue
            other = next_M[r]
            while other != r and last < 0:
                examined += 1
                h, other_tokens = gpu_M[other], tokens_M[other]
                there = busy_seconds(other_tokens, rates)
                for option in range(2):
                    moved = need if option == 0 else tokens
                    if (option == 0 and not enough) or (option == 1 and enough and need == tokens):
                        continue
                    added = busy_seconds(other_tokens + moved, rates) - there
                    if h == root and gpu != root:
                        # back where it began: all that counts is what the chain saves there
                        seconds, total = label_3G[_SECONDS, gpu] + added, label_3G[_TOKENS, gpu] + moved
                        after = max(seconds - limits.seconds, 0.0) + per_exchange * max(total - limits.tokens, 0.0)
                        if after < 0.9 * before:
                            last, last_source, last_target, last_moved = gpu, r, np.int64(other), moved
                            break
                    elif h != gpu and way_4G[_HOPS, h] >= -1:
                        excess = load.seconds_G[h] + added - limits.seconds
                        more = load.tokens_G[h] + moved - limits.tokens
                        if excess <= slack and more <= 0:
                            last, last_source, last_target, last_moved = gpu, r, np.int64(other), moved
                            break
                        freed = here - busy_seconds(tokens - moved, rates)
                        score = max(excess, 0.0) + per_exchange * max(more, 0) + max(added - freed, 0.0)
                        if hops + 1 < depth and score < label_3G[_EXCESS, h]:
                            if label_3G[_EXCESS, h] == np.inf:
                                queue_G[tail] = h
                                tail += 1
                            label_3G[_EXCESS, h], way_4G[_HOPS, h] = score, hops + 1
                            way_4G[_FROM, h], way_4G[_TO, h], way_4G[_MOVED, h] = r, other, moved
                            if gpu == root:
                                label_3G[_SECONDS, h] = load.seconds_G[root] - freed
                                label_3G[_TOKENS, h] = load.tokens_G[root] - moved
                            else:
                                label_3G[_SECONDS, h] = label_3G[_SECONDS, gpu]
                                label_3G[_TOKENS, h] = label_3G[_TOKENS, gpu]
                other = next_M[other]
    if last < 0:
        return False, examined
    _move(last_source, last_target, last_moved, copies, load, rates)
    while last != root:
        source, target, moved = way_4G[_FROM, last], way_4G[_TO, last], way_4G[_MOVED, last]
        _move(source, target, moved, copies, load, rates)
        last = np.int64(gpu_M[source])
    return True, examined


@njit(cache=True, nogil=True, allocates=False, forceinline=True)
def _most(load: GpuLoad) -> Limits:
    """Most seconds and most tokens of any GPU."""
    seconds, tokens = load.seconds_G[0], load.tokens_G[0]
    for g in range(1, len(load.seconds_G)):
        seconds, tokens = max(seconds, load.seconds_G[g]), max(tokens, load.tokens_G[g])
    return Limits(seconds, tokens)


@njit(cache=True, nogil=True, allocates=False)
def _keep(copies: MovableCopies, load: GpuLoad, memory: SearchMemory) -> None:
    for r in range(len(copies.tokens_M)):
        memory.kept_M[r] = copies.tokens_M[r]
    for g in range(len(load.seconds_G)):
        memory.kept_seconds_G[g], memory.kept_tokens_G[g] = load.seconds_G[g], load.tokens_G[g]


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _go_back(copies: MovableCopies, load: GpuLoad, memory: SearchMemory) -> None:
    """To what was kept."""
    for r in range(len(copies.tokens_M)):
        copies.tokens_M[r] = memory.kept_M[r]
    for g in range(len(load.seconds_G)):
        load.seconds_G[g], load.tokens_G[g] = memory.kept_seconds_G[g], memory.kept_tokens_G[g]


@njit(cache=True, nogil=True, allocates=False, inline="always")
def _lower(
    copies: MovableCopies, load: GpuLoad, rates: Rates, least: Limits, enough: float, depth: int, fuel: int,
    levels: bool, memory: SearchMemory,
) -> tuple[float, int]:  # fmt: skip
    """Lower the layer's time from ``copies``, in place; returns what is reached and the fuel left.

    Args:
        least: of :func:`least_load`.
        enough: time at which the search ends.
        depth: GPUs that a chain may pass on.
        fuel: pairs of copies examined before the search stops.
        levels: level GPUs first.
    """
    per_exchange = rates.exchange_seconds
    best_seconds, best_tokens = _most(load)
    _keep(copies, load, memory)
    share, mode, failed, first = 1.0 if levels else 0.3, _BOTH, 0, levels
    while fuel > 0 and failed < 3:
        gap_seconds, gap_tokens = max(best_seconds - least.seconds, 0.0), max(best_tokens - least.tokens, 0)
        if best_seconds + per_exchange * best_tokens < enough:
            break
        limit, most = best_seconds - share * gap_seconds, best_tokens - int(share * gap_tokens)
        met = True
        if first:
            fuel -= _level(copies, load, rates, Limits(limit, most), 6, fuel)
        else:
            if mode == _SECONDS_ONLY:
                more = int(0.9 * share * gap_seconds / per_exchange) if per_exchange > 0 else best_tokens
                most = best_tokens + more
            elif mode == _TOKENS_ONLY:
                limit = best_seconds + 0.9 * per_exchange * share * gap_tokens
            limits = Limits(limit, most)
            for g in range(len(load.seconds_G)):
                tries = 0
                while met and (load.seconds_G[g] > limit * (1 + SAME) or load.tokens_G[g] > most):
                    tries += 1
                    fuel -= copies.first_G[g + 1] - copies.first_G[g]
                    met = tries <= 8
                    if met and not _shed_directly(g, copies, load, rates, limits):
                        met, examined = _shed_by_chain(g, copies, load, rates, limits, depth, memory)
                        fuel -= examined
                if not met:
                    break
        seconds, tokens = _most(load)
        better = seconds + per_exchange * tokens < (best_seconds + per_exchange * best_tokens) * (1 - SAME)
        if better:
            best_seconds, best_tokens, failed = seconds, tokens, 0
            _keep(copies, load, memory)
        elif not first or fuel <= 0:
            # chains go on from the levelled tokens, whatever those were worth, where there is fuel for any
            _go_back(copies, load, memory)
        if first:
            share, first = 0.5, False
        elif met and better:
            share = min(2 * share, 1.0)
        else:
            share *= 0.25
            if share < 0.1:
                share, mode, failed = 0.15, (mode + 1) % 3, failed + 1
    return best_seconds + per_exchange * best_tokens, fuel


@njit(cache=True, nogil=True, allocates=False)
def _restore(best_M: IntArray, copies: MovableCopies, load: GpuLoad, rates: Rates) -> None:
    """Back to these tokens, with the GPUs' load."""
    for r in range(len(copies.tokens_M)):
        tokens, best, g = copies.tokens_M[r], best_M[r], copies.gpu_M[r]
        if tokens != best:
            load.seconds_G[g] += busy_seconds(best, rates) - busy_seconds(tokens, rates)
            load.tokens_G[g] += best - tokens
            copies.tokens_M[r] = best


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _disturb(passed: int, copies: MovableCopies, load: GpuLoad, rates: Rates) -> int:
    """Take all tokens of the busiest GPU's next copy, from ``passed`` on, to the expert's next one.

    Returns the number of copies passed, -1 where none is left.
    """
    busiest, most = 0, 0.0
    for g in range(len(load.seconds_G)):
        time = load.seconds_G[g] + rates.exchange_seconds * load.tokens_G[g]
        if time > most:
            busiest, most = g, time
    for r in range(copies.first_G[busiest] + passed, copies.first_G[busiest + 1]):
        if copies.tokens_M[r] > 0:
            _move(r, np.int64(copies.next_M[r]), copies.tokens_M[r], copies, load, rates)
            return int(r + 1 - copies.first_G[busiest])
    return -1


@njit(cache=True, nogil=True, allocates=False)
def search(
    copies: MovableCopies,
    load: GpuLoad,
    rates: Rates,
    depth: int,
    fuel: int,
    thorough: bool | np.bool_,
    memory: SearchMemory,
) -> float:
    """Lower the layer's time from ``copies``; a thorough search goes on from elsewhere while fuel is left.

    Starts have half of the fuel that is left: ``copies``, whole experts spread over copies; then, in turn, the best so
    far with a copy of its busiest GPU served elsewhere. Leaves the best tokens in ``copies``; ``load`` is that of the
    last try. Returns the time of the best.

    Args:
        depth: GPUs that a chain of moves may pass on.
        fuel: pairs of copies examined before the search stops.
    """
    tokens_M, best_M = copies.tokens_M, memory.best_M
    most, least = _most(load), least_load(copies, load, rates, memory.queue_G)
    best = most.seconds + rates.exchange_seconds * most.tokens
    bound = least.seconds + rates.exchange_seconds * least.tokens
    enough = max(1.001 * bound, bound + ENOUGH * (best - bound))
    for r in range(len(tokens_M)):
        best_M[r] = tokens_M[r]
    start, passed = 0, _ZERO
    while fuel > 0 and best > enough and (thorough or start == 0):
        given = max(fuel // 2, 1) if thorough else fuel
        if start == 1:
            serve_whole(copies, load, rates, memory.order_M)
        elif start > 1:
            given = min(fuel, TRY)
            _restore(best_M, copies, load, rates)
            passed = _disturb(passed, copies, load, rates)
            if passed < 0:
                break
        reached, left = _lower(copies, load, rates, least, enough, depth, given, start < 2, memory)
        fuel -= given - max(left, 0)
        if reached < best * (1 - SAME):
            best, passed = reached, _ZERO
            for r in range(len(tokens_M)):
                best_M[r] = tokens_M[r]
        start += 1
    for r in range(len(tokens_M)):
        tokens_M[r] = best_M[r]
    return best
