"""Compiled time of layers whose experts have one copy each: straight from its tokens, with no runs and no tables.

Equal to ``layer_kernels.time_layer`` for the same plan, to the last bit: tokens are whole numbers, and a GPU's expert
times are added in the order of its experts.

Axes: L layers, S source ranks (rank s is GPU s), E experts, T tokens in order of their ranks, G GPUs, X parts.
"""

from __future__ import annotations

import numpy as np

from moeless.costs.kernels import add_copy, exchange_seconds, slowest_gpu
from moeless.jit import njit

# what one layer's timing leaves for the tally
PART_EXPERT, PART_EXCHANGE, PART_IMBALANCE, PART_ACTIVE = 0, 1, 2, 3
NUM_PARTS = 4

# rows of ``count_3G``: a GPU's tokens, those of them from itself, and from other islands
_ALL, _LOCAL, _FAR = 0, 1, 2


@njit(cache=True, nogil=True)
def locate(expert_LR, gpu_LR, gpu_LE):  # type: ignore[no-untyped-def]
    """The GPU of each expert of layers with one copy of each; others' rows are of no use."""
    for layer in range(len(gpu_LE)):
        for r in range(gpu_LE.shape[1]):
            gpu_LE[layer, expert_LR[layer, r]] = gpu_LR[layer, r]


@njit(cache=True, nogil=True)
def single_layers(start, stop, topk_TLK, row_T, rank_T, gpu_LE, terms, num_gpus, part_LX, load_LE):  # type: ignore[no-untyped-def]
    """Layers ``start`` to ``stop`` of one iteration, into their rows of ``part_LX`` and ``load_LE``.

    All in one function: each array handed to another costs as much as a few tokens.

    Args:
        row_T, rank_T: rows of ``topk_TLK`` and source ranks of the tokens, the ranks ascending.
        gpu_LE: where each expert is, as :func:`locate` fills it.
    """
    top, tokens, experts = topk_TLK.shape[2], len(row_T), load_LE.shape[1]
    active_E, seconds_G = np.empty(experts + 1, np.int64), np.empty(num_gpus)
    count_3G = np.empty((3, num_gpus), np.int64)
    island_G = np.arange(num_gpus) // terms.island_size
    many = num_gpus > terms.island_size
    mean = tokens * top / num_gpus
    for layer in range(start, stop):
        for e in range(experts):
            load_LE[layer, e] = 0
        for g in range(num_gpus):
            count_3G[_ALL, g], count_3G[_LOCAL, g], count_3G[_FAR, g] = 0, 0, 0
            seconds_G[g] = 0.0
        most_near, most_far, t = 0, 0, 0
        while t < tokens:
            s, first, local, far = rank_T[t], t, 0, 0
            while t < tokens and rank_T[t] == s:
                row = row_T[t]
                for k in range(top):
                    e = topk_TLK[row, layer, k]
                    g = gpu_LE[layer, e]
                    load_LE[layer, e] += 1
                    local += g == s
                    if many:
                        beyond = island_G[g] != island_G[s]
                        far += beyond
                        count_3G[_FAR, g] += beyond
                t += 1
            count_3G[_LOCAL, s] = local
            most_far = max(most_far, far)
            most_near = max(most_near, (t - first) * top - local - far)
        active = 0
        for e in range(experts):
            # written whatever it is: a branch would be taken at random
            active_E[active] = e
            active += load_LE[layer, e] > 0
        for i in range(active):
            e = active_E[i]
            g = gpu_LE[layer, e]
            count_3G[_ALL, g] += load_LE[layer, e]
            add_copy(load_LE[layer, e], g, terms, seconds_G)
        most = 0
        for g in range(num_gpus):
            n, beyond = count_3G[_ALL, g], count_3G[_FAR, g]
            most = max(most, n)
            most_far = max(most_far, beyond)
            most_near = max(most_near, n - count_3G[_LOCAL, g] - beyond)
        part_LX[layer, PART_EXPERT] = slowest_gpu(seconds_G, terms)
        part_LX[layer, PART_EXCHANGE] = exchange_seconds(
            float(most_near), float(most_far), float(most), terms, num_gpus
        )
        part_LX[layer, PART_IMBALANCE] = most / mean if mean > 0 else 1.0
        part_LX[layer, PART_ACTIVE] = active
