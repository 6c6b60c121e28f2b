"""Compiled bookkeeping of expert copies: provisioning one layer, with eviction and the copy engines' queues."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeless.contracts import BoolArray, FloatArray, IntArray
from moeless.jit import njit
from moeless.serverless.keep_alive import COVERED, FIRST_BIN_SECONDS, MIN_GAPS

# accounts, as places in one array of floats
RESIDENT, LOADS, EVICTIONS, REFUSED, BY_TIER, LOGGED = 0, 1, 2, 3, 4, 7
NUM_COUNTERS = 8


class PoolState(NamedTuple):
    """A pool's arrays and settings for compiled code, which changes the arrays in place.

    Attributes:
        wanted_EG: memory to work in, all False between calls.
        log_X5: room for transfers: GPU, layer, expert, begin and end of each; of no rows where nobody asks.
    """

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
    wanted_EG: BoolArray
    log_X5: FloatArray


@njit(cache=True, nogil=True, allocates=False)
def evict(layer, expert, gpu, end, pool):  # type: ignore[no-untyped-def]
    """Free a copy's memory as of ``end``."""
    pool.counters[RESIDENT] += pool.num_bytes * max(0.0, end - pool.born_LEG[layer, expert, gpu])
    pool.counters[EVICTIONS] += 1
    pool.ready_LEG[layer, expert, gpu] = np.inf
    pool.born_LEG[layer, expert, gpu] = np.inf
    pool.resident_G[gpu] -= pool.num_bytes


@njit(cache=True, nogil=True, allocates=False)
def make_room(gpu, wanted, now, pool):  # type: ignore[no-untyped-def]
    """Evict the least recently used unplanned copies of a GPU until ``wanted`` bytes fit; False where they cannot."""
    ready_LEG, used_LEG, planned_LEG = pool.ready_LEG, pool.used_LEG, pool.planned_LEG
    layers, experts, _ = ready_LEG.shape
    while pool.resident_G[gpu] + wanted > pool.capacity_G[gpu]:
        oldest, at_layer, at_expert = np.inf, -1, -1
        for layer in range(layers):
            for expert in range(experts):
                # a copy on its way cannot be called back
                if planned_LEG[layer, expert, gpu] or ready_LEG[layer, expert, gpu] > now:
                    continue
                if used_LEG[layer, expert, gpu] < oldest:
                    oldest, at_layer, at_expert = used_LEG[layer, expert, gpu], layer, expert
        if at_layer < 0:
            return False
        evict(at_layer, at_expert, gpu, now, pool)
    return True


@njit(cache=True, nogil=True, allocates=False)
def expire(layer, now, pool):  # type: ignore[no-untyped-def]
    """Evict a layer's unplanned copies whose keep-alive has run out, as of when it did; returns how many linger on."""
    born_EG, planned_EG, lingering = pool.born_LEG[layer], pool.planned_LEG[layer], 0
    for expert in range(born_EG.shape[0]):
        for gpu in range(born_EG.shape[1]):
            if born_EG[expert, gpu] != np.inf and not planned_EG[expert, gpu]:
                lingering += not _expired(layer, expert, gpu, now, pool)
    return lingering


@njit(cache=True, nogil=True, allocates=False)
def _expired(layer, expert, gpu, now, pool):  # type: ignore[no-untyped-def]
    """Whether an unplanned copy's keep-alive has run out; it is evicted as of when it did."""
    idle = max(pool.used_LEG[layer, expert, gpu], pool.ready_LEG[layer, expert, gpu])
    end = idle + pool.keep_LE[layer, expert]
    if end <= now:
        evict(layer, expert, gpu, end, pool)
    return end <= now


@njit(cache=True, nogil=True, allocates=False)
def _source(layer, expert, gpu, now, pool):  # type: ignore[no-untyped-def]
    """The quickest place to load from: a warm copy on the island, one elsewhere, or the experts' home."""
    ready_LEG, tier_seconds, island_size = pool.ready_LEG, pool.tier_seconds, pool.island_size
    best, tier = tier_seconds[2], 2
    for other in range(ready_LEG.shape[2]):
        if other == gpu or ready_LEG[layer, expert, other] > now:
            continue
        kind = 0 if other // island_size == gpu // island_size else 1
        if tier_seconds[kind] < best:
            best, tier = tier_seconds[kind], kind
    return best, tier


@njit(cache=True, nogil=True, allocates=False)
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


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _mark_wanted(layer, expert_R, gpu_R, now, pool):  # type: ignore[no-untyped-def]
    """Note which copies the layer's new plan wants; of those that it drops the idle time begins, and some expire."""
    used_EG, planned_EG, born_EG = pool.used_LEG[layer], pool.planned_LEG[layer], pool.born_LEG[layer]
    experts, gpus = used_EG.shape
    wanted_EG = pool.wanted_EG
    for r in range(len(expert_R)):
        wanted_EG[expert_R[r], gpu_R[r]] = True
    for expert in range(experts):
        lingers = False
        for gpu in range(gpus):
            wanted, planned = wanted_EG[expert, gpu], planned_EG[expert, gpu]
            if planned and not wanted:
                used_EG[expert, gpu] = max(used_EG[expert, gpu], now)
            elif pool.adaptive and wanted and not planned and used_EG[expert, gpu] >= 0:
                gap = max(0.0, now - used_EG[expert, gpu])
                pool.keep_LE[layer, expert] = learn(gap, pool.histogram_LEB[layer, expert], pool.fixed_keep_alive)
            planned_EG[expert, gpu], wanted_EG[expert, gpu] = wanted, False
            lingers |= not wanted and born_EG[expert, gpu] != np.inf
        for gpu in range(gpus if lingers else 0):
            if born_EG[expert, gpu] != np.inf and not planned_EG[expert, gpu]:
                _expired(layer, expert, gpu, now, pool)


@njit(cache=True, nogil=True, allocates=False)
def provision(layer, expert_R, gpu_R, now, pool):  # type: ignore[no-untyped-def]
    """Make a plan the current one; see :meth:`moeless.serverless.pool.InstancePool.provision`."""
    _mark_wanted(layer, expert_R, gpu_R, now, pool)
    born_EG = pool.born_LEG[layer]
    for r in range(len(expert_R)):
        expert, gpu = expert_R[r], gpu_R[r]
        if born_EG[expert, gpu] != np.inf:
            continue
        counters = pool.counters
        if not make_room(gpu, pool.num_bytes, now, pool):
            counters[REFUSED] += 1
            continue
        start = now
        seconds, tier, begin = 0.0, 2, 0.0
        if not pool.instant:
            begin = pool.start_seconds
            seconds, tier = _source(layer, expert, gpu, now, pool)
            # a GPU's copy engine takes one transfer at a time
            start = max(now, pool.engine_free_G[gpu])
            pool.engine_free_G[gpu] = start + seconds
        born_EG[expert, gpu] = now
        # instances start beside each other; only their transfers queue
        pool.ready_LEG[layer, expert, gpu] = start + seconds + begin
        pool.used_LEG[layer, expert, gpu] = start + seconds + begin
        pool.resident_G[gpu] += pool.num_bytes
        at = int(counters[LOGGED])
        if at < len(pool.log_X5):
            row_5 = pool.log_X5[at]
            row_5[0], row_5[1], row_5[2], row_5[3], row_5[4] = gpu, layer, expert, start, start + seconds
            counters[LOGGED] += 1
        counters[LOADS] += 1
        counters[BY_TIER + tier] += 1
