"""Compiled bookkeeping of expert copies: provisioning one layer, with eviction and the copy engines' queues."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeless.contracts import BoolArray, FloatArray, IntArray
from moeless.jit import njit
from moeless.serverless.keep_alive import COVERED, FIRST_BIN_SECONDS, MIN_GAPS

# accounts, as places in one array of floats
RESIDENT, LOADS, EVICTIONS, REFUSED, BY_TIER = 0, 1, 2, 3, 4
NUM_COUNTERS = 7


class PoolState(NamedTuple):
    """A pool's arrays and settings for compiled code, which changes the arrays in place."""

    num_bytes: float
    fixed_keep_alive: float
    adaptive: bool
    keep_LE: FloatArray
    histogram_LEB: IntArray
    island_size: int
    tier_seconds: FloatArray
    start_seconds: float
    instant: bool
    ready_LEG: FloatArray
    born_LEG: FloatArray
    used_LEG: FloatArray
    planned_LEG: BoolArray
    engine_free_G: FloatArray
    resident_G: FloatArray
    capacity_G: FloatArray
    counters: FloatArray


@njit(cache=True, nogil=True)
def evict(layer, expert, gpu, end, num_bytes, ready, born, resident_G, counters):  # type: ignore[no-untyped-def]
    """Free a copy's memory as of ``end``."""
    counters[RESIDENT] += num_bytes * max(0.0, end - born[layer, expert, gpu])
    counters[EVICTIONS] += 1
    ready[layer, expert, gpu] = np.inf
    born[layer, expert, gpu] = np.inf
    resident_G[gpu] -= num_bytes


@njit(cache=True, nogil=True)
def make_room(  # type: ignore[no-untyped-def]
    gpu, wanted, now, num_bytes, ready, born, used, planned, resident_G, capacity_G, counters
):
    """Evict the least recently used unplanned copies of a GPU until ``wanted`` bytes fit; False where they cannot."""
    layers, experts, _ = ready.shape
    while resident_G[gpu] + wanted > capacity_G[gpu]:
        oldest, at_layer, at_expert = np.inf, -1, -1
        for layer in range(layers):
            for expert in range(experts):
                # a copy on its way cannot be called back
                if planned[layer, expert, gpu] or ready[layer, expert, gpu] > now:
                    continue
                if used[layer, expert, gpu] < oldest:
                    oldest, at_layer, at_expert = used[layer, expert, gpu], layer, expert
        if at_layer < 0:
            return False
        evict(at_layer, at_expert, gpu, now, num_bytes, ready, born, resident_G, counters)
    return True


@njit(cache=True, nogil=True)
def expire(layer, now, num_bytes, keep_LE, ready, born, used, planned, resident_G, counters):  # type: ignore[no-untyped-def]
    """Evict a layer's unplanned copies whose keep-alive has run out, as of when it did."""
    _, experts, gpus = ready.shape
    for expert in range(experts):
        for gpu in range(gpus):
            if born[layer, expert, gpu] == np.inf or planned[layer, expert, gpu]:
                continue
            end = max(used[layer, expert, gpu], ready[layer, expert, gpu]) + keep_LE[layer, expert]
            if end <= now:
                evict(layer, expert, gpu, end, num_bytes, ready, born, resident_G, counters)


@njit(cache=True, nogil=True)
def _source(layer, expert, gpu, now, island_size, tier_seconds, ready):  # type: ignore[no-untyped-def]
    """The quickest place to load from: a warm copy on the island, one elsewhere, or the experts' home."""
    best, tier = tier_seconds[2], 2
    for other in range(ready.shape[2]):
        if other == gpu or ready[layer, expert, other] > now:
            continue
        kind = 0 if other // island_size == gpu // island_size else 1
        if tier_seconds[kind] < best:
            best, tier = tier_seconds[kind], kind
    return best, tier


@njit(cache=True, nogil=True)
def learn(gap, histogram_B, fixed):  # type: ignore[no-untyped-def]
    """Count an idle gap; the keep-alive that covers most gaps so far."""
    place = 0
    edge = FIRST_BIN_SECONDS
    while edge < gap and place < len(histogram_B) - 1:
        place += 1
        edge *= 2.0
    histogram_B[place] += 1
    total = histogram_B.sum()
    if total < MIN_GAPS:
        return fixed
    seen, edge = 0, FIRST_BIN_SECONDS
    for b in range(len(histogram_B)):
        seen += histogram_B[b]
        if seen >= COVERED * total:
            return edge
        edge *= 2.0
    return edge


@njit(cache=True, nogil=True)
def provision(  # type: ignore[no-untyped-def]
    layer,
    expert_R,
    gpu_R,
    now,
    num_bytes,
    fixed_keep_alive,
    adaptive,
    keep_LE,
    histogram_LEB,
    island_size,
    tier_seconds,
    start_seconds,
    instant,
    ready,
    born,
    used,
    planned,
    engine_free_G,
    resident_G,
    capacity_G,
    counters,
):
    """Make a plan the current one; see :meth:`moeless.serverless.pool.InstancePool.provision`."""
    experts, gpus = ready.shape[1], ready.shape[2]
    wanted = np.zeros((experts, gpus), np.bool_)
    for r in range(len(expert_R)):
        wanted[expert_R[r], gpu_R[r]] = True
    for expert in range(experts):
        for gpu in range(gpus):
            if planned[layer, expert, gpu] and not wanted[expert, gpu]:
                # a copy's idle time starts when the plan drops it, not before
                used[layer, expert, gpu] = max(used[layer, expert, gpu], now)
            elif adaptive and wanted[expert, gpu] and not planned[layer, expert, gpu] and used[layer, expert, gpu] >= 0:
                gap = max(0.0, now - used[layer, expert, gpu])
                keep_LE[layer, expert] = learn(gap, histogram_LEB[layer, expert], fixed_keep_alive)
            planned[layer, expert, gpu] = wanted[expert, gpu]
    expire(layer, now, num_bytes, keep_LE, ready, born, used, planned, resident_G, counters)
    for r in range(len(expert_R)):
        expert, gpu = expert_R[r], gpu_R[r]
        if born[layer, expert, gpu] != np.inf:
            continue
        if not make_room(gpu, num_bytes, now, num_bytes, ready, born, used, planned, resident_G, capacity_G, counters):
            counters[REFUSED] += 1
            continue
        start = now
        seconds, tier, begin = 0.0, 2, 0.0
        if not instant:
            begin = start_seconds
            seconds, tier = _source(layer, expert, gpu, now, island_size, tier_seconds, ready)
            # a GPU's copy engine takes one transfer at a time
            start = max(now, engine_free_G[gpu])
            engine_free_G[gpu] = start + seconds
        born[layer, expert, gpu] = now
        # instances start beside each other; only their transfers queue
        ready[layer, expert, gpu] = start + seconds + begin
        used[layer, expert, gpu] = start + seconds + begin
        resident_G[gpu] += num_bytes
        counters[LOADS] += 1
        counters[BY_TIER + tier] += 1
