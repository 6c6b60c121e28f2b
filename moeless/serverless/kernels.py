"""Compiled bookkeeping of expert copies: provisioning one layer, with eviction and the copy engines' queues."""

from __future__ import annotations

import numpy as np
from numba import njit

# accounts, as places in one array of floats
RESIDENT, LOADS, EVICTIONS, REFUSED, BY_TIER = 0, 1, 2, 3, 4
NUM_COUNTERS = 7


@njit(cache=True)
def _evict(layer, expert, gpu, end, num_bytes, ready, born, resident_G, counters):  # type: ignore[no-untyped-def]
    counters[RESIDENT] += num_bytes * max(0.0, end - born[layer, expert, gpu])
    counters[EVICTIONS] += 1
    ready[layer, expert, gpu] = np.inf
    born[layer, expert, gpu] = np.inf
    resident_G[gpu] -= num_bytes


@njit(cache=True)
def _make_room(gpu, now, num_bytes, ready, born, used, planned, resident_G, capacity_G, counters):  # type: ignore[no-untyped-def]
    """Evict the least recently used unplanned copies of a GPU until one more fits; False where none is left."""
    layers, experts, _ = ready.shape
    while resident_G[gpu] + num_bytes > capacity_G[gpu]:
        oldest, at_layer, at_expert = np.inf, -1, -1
        for layer in range(layers):
            for expert in range(experts):
                if planned[layer, expert, gpu] or born[layer, expert, gpu] == np.inf:
                    continue
                # a copy on its way cannot be called back
                if ready[layer, expert, gpu] > now:
                    continue
                if used[layer, expert, gpu] < oldest:
                    oldest, at_layer, at_expert = used[layer, expert, gpu], layer, expert
        if at_layer < 0:
            return False
        _evict(at_layer, at_expert, gpu, now, num_bytes, ready, born, resident_G, counters)
    return True


@njit(cache=True)
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


@njit(cache=True)
def provision(  # type: ignore[no-untyped-def]
    layer,
    expert_R,
    gpu_R,
    now,
    num_bytes,
    keep_alive,
    island_size,
    tier_seconds,
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
    for expert in range(experts):
        for gpu in range(gpus):
            if planned[layer, expert, gpu]:
                # a copy's idle time starts when the plan drops it, not before
                used[layer, expert, gpu] = max(used[layer, expert, gpu], now)
                planned[layer, expert, gpu] = False
    for r in range(len(expert_R)):
        planned[layer, expert_R[r], gpu_R[r]] = True
    for expert in range(experts):
        for gpu in range(gpus):
            if born[layer, expert, gpu] == np.inf or planned[layer, expert, gpu]:
                continue
            end = max(used[layer, expert, gpu], ready[layer, expert, gpu]) + keep_alive
            if end <= now:
                _evict(layer, expert, gpu, end, num_bytes, ready, born, resident_G, counters)
    for r in range(len(expert_R)):
        expert, gpu = expert_R[r], gpu_R[r]
        if born[layer, expert, gpu] != np.inf:
            continue
        if not _make_room(gpu, now, num_bytes, ready, born, used, planned, resident_G, capacity_G, counters):
            counters[REFUSED] += 1
            continue
        start = now
        seconds, tier = 0.0, 2
        if not instant:
            seconds, tier = _source(layer, expert, gpu, now, island_size, tier_seconds, ready)
            # a GPU's copy engine takes one transfer at a time
            start = max(now, engine_free_G[gpu])
            engine_free_G[gpu] = start + seconds
        born[layer, expert, gpu] = now
        ready[layer, expert, gpu] = start + seconds
        used[layer, expert, gpu] = start + seconds
        resident_G[gpu] += num_bytes
        counters[LOADS] += 1
        counters[BY_TIER + tier] += 1
