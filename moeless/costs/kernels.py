"""Compiled layer times of cost models that are a few numbers; equal to ``CostModel.layer_seconds``.

Axes: S source ranks (rank s is GPU s), R replicas, G GPUs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeless.jit import njit


class KernelTerms(NamedTuple):
    """A cost model as numbers. ``local_is_free`` False is the paper's exchange: all of a GPU's tokens count."""

    token_seconds: float
    floor_seconds: float
    launch_seconds: float
    reduce_max: bool
    token_bytes: float
    local_is_free: bool
    island_size: int
    fast_bytes_per_second: float
    fast_latency: float
    slow_bytes_per_second: float
    slow_latency: float


@njit(cache=True, nogil=True)
def exchange_seconds(most_fast, most_slow, most, terms, num_gpus):  # type: ignore[no-untyped-def]
    """Both directions of a layer's all-to-all, from the most tokens of any GPU: within a tier in one direction; all."""
    if not terms.local_is_free:
        return 2.0 * most * terms.token_bytes / terms.slow_bytes_per_second
    if num_gpus == 1:
        return 0.0
    worst = 0.0
    if terms.island_size > 1:
        worst = terms.fast_latency + most_fast * terms.token_bytes / terms.fast_bytes_per_second
    if num_gpus > terms.island_size:
        worst = max(worst, terms.slow_latency + most_slow * terms.token_bytes / terms.slow_bytes_per_second)
    return 2.0 * worst


@njit(cache=True, nogil=True)
def exchange_time(sent_fast, sent_slow, got_fast, got_slow, got_all, terms, num_gpus):  # type: ignore[no-untyped-def]
    """:func:`exchange_seconds` from tokens by GPU, tier and direction."""
    most_fast = max(sent_fast.max(), got_fast.max())
    most_slow = max(sent_slow.max(), got_slow.max())
    return exchange_seconds(most_fast, most_slow, got_all.max(), terms, num_gpus)


@njit(cache=True, nogil=True)
def quota_time(quota_SR, gpu_R, terms, num_gpus, load_G):  # type: ignore[no-untyped-def]
    """Expert and exchange seconds of one layer; fills ``load_G`` with tokens per GPU."""
    return quota_time_with(quota_SR, gpu_R, terms, num_gpus, load_G, np.empty((5, num_gpus)))


@njit(cache=True, nogil=True)
def add_copy(tokens, gpu, terms, seconds_G):  # type: ignore[no-untyped-def]
    """A copy's expert time on top of its GPU's."""
    time = max(tokens * terms.token_seconds, terms.floor_seconds)
    if terms.reduce_max:
        seconds_G[gpu] = max(seconds_G[gpu], time)
    else:
        seconds_G[gpu] += time


@njit(cache=True, nogil=True)
def slowest_gpu(seconds_G, terms):  # type: ignore[no-untyped-def]
    """When the last GPU that has anything to do is done, its launch included."""
    worst = 0.0
    for g in range(len(seconds_G)):
        worst = max(worst, seconds_G[g])
    return worst + terms.launch_seconds if worst > 0.0 else 0.0


@njit(cache=True, nogil=True)
def quota_time_with(quota_SR, gpu_R, terms, num_gpus, load_G, scratch_5G):  # type: ignore[no-untyped-def]
    """:func:`quota_time` with memory to work in, whatever it holds."""
    num_sources, num_replicas = quota_SR.shape
    for g in range(num_gpus):
        load_G[g] = 0.0
        for row in range(5):
            scratch_5G[row, g] = 0.0
    seconds_G, sent_fast, sent_slow = scratch_5G[0], scratch_5G[1], scratch_5G[2]
    got_fast, got_slow = scratch_5G[3], scratch_5G[4]
    for r in range(num_replicas):
        gpu = gpu_R[r]
        tokens = 0
        first = gpu - gpu % terms.island_size
        for s in range(num_sources):
            n = quota_SR[s, r]
            if n == 0:
                continue
            tokens += n
            if s == gpu:
                continue
            if first <= s < first + terms.island_size:
                sent_fast[s] += n
                got_fast[gpu] += n
            else:
                sent_slow[s] += n
                got_slow[gpu] += n
        if tokens > 0:
            load_G[gpu] += tokens
            add_copy(tokens, gpu, terms, seconds_G)
    return slowest_gpu(seconds_G, terms), exchange_time(
        sent_fast, sent_slow, got_fast, got_slow, load_G, terms, num_gpus
    )
