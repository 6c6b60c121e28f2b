"""Compiled inner loops of the simulator: composing loads, timing layers, adding up.

Axes: L layers, S source ranks, E experts, R replicas (padded with -1), G GPUs, N spans, I iterations, X the
columns of ``span_sums``.
"""

from __future__ import annotations

import numpy as np

from moeless.jit import njit
from moeless.simulator.layer_kernels import LOAD, load_table, load_tokens, memory, time_layer
from moeless.simulator.plan_rows import shares_of
from moeless.simulator.single_kernels import PART_ACTIVE, PART_EXCHANGE, PART_EXPERT, PART_IMBALANCE, single_layers

# columns of the tally, sums over (iteration, layer) pairs
TOTAL, EXPERT, EXCHANGE, MISC, CONTROL, STALL = 0, 1, 2, 3, 4, 5
IMBALANCE, BALANCED, REPLICAS, ACTIVE, WARM, OWN, WHOLE = 6, 7, 8, 9, 10, 11, 12
NUM_TALLIES = 13


@njit(cache=True, nogil=True)
def count_loads(topk_TLK, start_N, count_N, rank_N, row_F, load_LSE):  # type: ignore[no-untyped-def]
    """Tokens by layer, source rank and expert of spans of rows (of ``row_F``'s rows where it is not empty)."""
    _, layers, top = topk_TLK.shape
    for n in range(len(start_N)):
        rank = rank_N[n]
        for at in range(start_N[n], start_N[n] + count_N[n]):
            row = row_F[at] if len(row_F) else at
            for layer in range(layers):
                for k in range(top):
                    load_LSE[layer, rank, topk_TLK[row, layer, k]] += 1


@njit(cache=True, nogil=True)
def sort_tokens(start_N, count_N, rank_N, row_F, num_ranks, row_T, rank_T):  # type: ignore[no-untyped-def]
    """Rows and source ranks of spans of rows (of ``row_F``'s where it is not empty), in order of the ranks."""
    at_S = np.zeros(num_ranks + 1, np.int64)
    for n in range(len(start_N)):
        at_S[rank_N[n] + 1] += count_N[n]
    for s in range(num_ranks):
        at_S[s + 1] += at_S[s]
    for n in range(len(start_N)):
        s = rank_N[n]
        for at in range(start_N[n], start_N[n] + count_N[n]):
            row_T[at_S[s]], rank_T[at_S[s]] = row_F[at] if len(row_F) else at, s
            at_S[s] += 1


@njit(cache=True, nogil=True)
def span_sums(start_N, stop_N, rank_N, sums_SX):  # type: ignore[no-untyped-def]
    """Tokens, attended positions, KV entries and logit rows of each rank, added to ``sums_SX`` ``[S, 4]``."""
    for n in range(len(start_N)):
        s, count = rank_N[n], stop_N[n] - start_N[n]
        sums_SX[s, 0] += count
        sums_SX[s, 1] += (start_N[n] + stop_N[n] + 1) * count / 2.0
        sums_SX[s, 2] += stop_N[n]
        sums_SX[s, 3] += 1


@njit(cache=True, nogil=True)
def imbalance(load_G):  # type: ignore[no-untyped-def]
    """Most tokens of a GPU over the mean; 1 where there are none."""
    mean = load_G.sum() / len(load_G)
    return load_G.max() / mean if mean > 0 else 1.0


@njit(cache=True, nogil=True)
def tally_layer(  # type: ignore[no-untyped-def]
    tally, expert, exchange, misc, control, stall, ratio, replicas, all_replicas, active, warm
):
    """Add one layer's run to the tally; returns its total seconds."""
    total = expert + exchange + misc + control + stall
    tally[TOTAL] += total
    tally[EXPERT] += expert
    tally[EXCHANGE] += exchange
    tally[MISC] += misc
    tally[CONTROL] += control
    tally[STALL] += stall
    tally[IMBALANCE] += ratio
    tally[BALANCED] += 1.0 / ratio
    tally[REPLICAS] += replicas
    tally[ACTIVE] += active
    tally[WARM] += warm
    tally[OWN] += total * replicas
    tally[WHOLE] += total * all_replicas
    return total


@njit(cache=True, nogil=True)
def time_some(  # type: ignore[no-untyped-def]
    start, stop, load_LSE, topk_TLK, row_T, rank_T, plans, gpu_LE, mode, rates, terms, num_gpus, m, part_LX, load_LE
):
    """:func:`time_layers` with memory to work in, and where experts with one copy are."""
    tables, experts, layer = load_LSE.shape[0] > 0, load_LE.shape[1], start
    serving_R = np.ones(plans.expert_LR.shape[1], np.int64)
    while layer < stop:
        single = layer
        while single < stop and plans.count_L[single] == experts and not tables:
            single += 1
        if single > layer:
            single_layers(layer, single, topk_TLK, row_T, rank_T, gpu_LE, terms, num_gpus, part_LX, load_LE)
            layer = single
            continue
        n = plans.count_L[layer]
        if tables:
            load_table(load_LSE[layer], m)
        else:
            load_tokens(topk_TLK, row_T, rank_T, layer, m)
        expert, exchange, active = time_layer(
            plans.expert_LR[layer, :n], plans.gpu_LR[layer, :n], plans.primary_LR[layer, :n], serving_R[:n],
            shares_of(layer, plans), mode, rates, terms, num_gpus, m,
        )  # fmt: skip
        part_LX[layer, PART_EXPERT], part_LX[layer, PART_EXCHANGE] = expert, exchange
        part_LX[layer, PART_IMBALANCE], part_LX[layer, PART_ACTIVE] = imbalance(m.sums_XG[LOAD]), active
        load_LE[layer] = m.expert_XE[0, :experts]
        layer += 1


@njit(cache=True, nogil=True)
def time_layers(  # type: ignore[no-untyped-def]
    start, stop, load_LSE, topk_TLK, row_T, rank_T, plans, gpu_LE, mode, rates, terms, num_gpus, part_LX, load_LE
):
    """Layers ``start`` to ``stop`` of one iteration under warm plans, into their rows of ``part_LX`` and ``load_LE``.

    Loads are ``load_LSE``, or where it is empty those of tokens as in :func:`layer_kernels.load_tokens`. ``gpu_LE``
    as :func:`single_kernels.locate` fills it; ``mode`` and ``rates`` as in :func:`layer_kernels.time_layer`.
    """
    experts = load_LE.shape[1]
    tokens = num_gpus * experts if load_LSE.shape[0] > 0 else len(row_T) * topk_TLK.shape[2]
    m = memory(num_gpus, experts, plans.count_L.max(), num_gpus, terms.island_size, tokens)
    time_some(
        start, stop, load_LSE, topk_TLK, row_T, rank_T, plans, gpu_LE, mode, rates, terms, num_gpus, m, part_LX, load_LE
    )  # fmt: skip


@njit(cache=True, nogil=True)
def tally_layers(part_LX, plans, experts, misc, control_L, tally, time_L):  # type: ignore[no-untyped-def]
    """Add the layers of one iteration under warm plans, in order; fills ``time_L``."""
    all_replicas = plans.count_L.sum()
    for layer in range(len(plans.count_L)):
        replicas = plans.count_L[layer]
        # primaries alone, and shares fixed ahead, leave nothing to decide: no counts are gathered
        control = control_L[layer] if replicas > experts and not plans.fixed_L[layer] else 0.0
        time_L[layer] = tally_layer(
            tally, part_LX[layer, PART_EXPERT], part_LX[layer, PART_EXCHANGE], misc, control, 0.0,
            part_LX[layer, PART_IMBALANCE], replicas, all_replicas, part_LX[layer, PART_ACTIVE], replicas,
        )  # fmt: skip
