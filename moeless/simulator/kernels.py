"""Compiled inner loops of the simulator: composing loads, timing layers, adding up.

Axes: L layers, S source ranks, E experts, R replicas (padded with -1), G GPUs, N spans, I iterations, X the
columns of ``span_sums``.
"""

from __future__ import annotations

import numpy as np

from moeless.costs.kernels import add_copy, exchange_time, slowest_gpu
from moeless.costs.nonexpert import nonexpert_times
from moeless.jit import njit
from moeless.placement.keep_kernels import kept_layers
from moeless.simulator.layer_kernels import LOAD, load_table, load_tokens, memory, time_layer

# columns of the tally, sums over (iteration, layer) pairs
TOTAL, EXPERT, EXCHANGE, MISC, CONTROL, STALL = 0, 1, 2, 3, 4, 5
IMBALANCE, BALANCED, REPLICAS, ACTIVE, WARM, OWN, WHOLE = 6, 7, 8, 9, 10, 11, 12
NUM_TALLIES = 13

# what one layer's timing leaves for the tally
PART_EXPERT, PART_EXCHANGE, PART_IMBALANCE, PART_ACTIVE = 0, 1, 2, 3
NUM_PARTS = 4


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
def time_layers(  # type: ignore[no-untyped-def]
    start, stop, load_LSE, topk_TLK, row_T, rank_T, num_experts, expert_LR, gpu_LR, primary_LR, count_L, mode, rates,
    terms, num_gpus, part_LX, load_LE,
):  # fmt: skip
    """Layers ``start`` to ``stop`` of one iteration under warm plans, into their rows of ``part_LX`` and ``load_LE``.

    Loads are ``load_LSE``, or where it is empty those of tokens as in :func:`layer_kernels.load_tokens`. ``mode`` and
    ``rates`` as in :func:`layer_kernels.time_layer`.
    """
    widest = count_L.max()
    tables = load_LSE.shape[0] > 0
    tokens = num_gpus * num_experts if tables else len(row_T) * topk_TLK.shape[2]
    m = memory(num_gpus, num_experts, widest, num_gpus, terms.island_size, tokens)
    serving_R = np.ones(widest, np.int64)
    for layer in range(start, stop):
        n = count_L[layer]
        if tables:
            load_table(load_LSE[layer], m)
        else:
            load_tokens(topk_TLK, row_T, rank_T, layer, m)
        expert, exchange, active = time_layer(
            expert_LR[layer, :n], gpu_LR[layer, :n], primary_LR[layer, :n], serving_R[:n], mode, rates, terms, num_gpus,
            m,
        )  # fmt: skip
        part_LX[layer, PART_EXPERT], part_LX[layer, PART_EXCHANGE] = expert, exchange
        part_LX[layer, PART_IMBALANCE], part_LX[layer, PART_ACTIVE] = imbalance(m.sums_XG[LOAD]), active
        load_LE[layer] = m.expert_XE[0, :num_experts]


@njit(cache=True, nogil=True)
def tally_layers(part_LX, count_L, experts, misc, control_L, tally, time_L):  # type: ignore[no-untyped-def]
    """Add the layers of one iteration under warm plans, in order; fills ``time_L``."""
    all_replicas = count_L.sum()
    for layer in range(len(count_L)):
        replicas = count_L[layer]
        # primaries alone leave nothing to decide: no counts are gathered
        control = control_L[layer] if replicas > experts else 0.0
        time_L[layer] = tally_layer(
            tally, part_LX[layer, PART_EXPERT], part_LX[layer, PART_EXCHANGE], misc, control, 0.0,
            part_LX[layer, PART_IMBALANCE], replicas, all_replicas, part_LX[layer, PART_ACTIVE], replicas,
        )  # fmt: skip


@njit(cache=True, nogil=True)
def _sparse_layer(topk_TLK, row_N, rank_N, layer, gpu_E, terms, num_gpus, tokens_E, scratch):  # type: ignore[no-untyped-def]
    """One layer of decode tokens where every expert has one copy, without the [S, E] matrix."""
    tokens_E[:] = 0
    scratch[:] = 0.0
    sent_fast, sent_slow, got_fast, got_slow, load_G, seconds_G = scratch
    for n in range(len(row_N)):
        s = rank_N[n]
        for k in range(topk_TLK.shape[2]):
            e = topk_TLK[row_N[n], layer, k]
            g = gpu_E[e]
            tokens_E[e] += 1
            load_G[g] += 1
            if g != s:
                if g // terms.island_size == s // terms.island_size:
                    sent_fast[s] += 1
                    got_fast[g] += 1
                else:
                    sent_slow[s] += 1
                    got_slow[g] += 1
    active = 0
    for e in range(len(tokens_E)):
        if tokens_E[e] > 0:
            active += 1
            add_copy(tokens_E[e], gpu_E[e], terms, seconds_G)
    exchange = exchange_time(sent_fast, sent_slow, got_fast, got_slow, load_G, terms, num_gpus)
    return slowest_gpu(seconds_G, terms), exchange, active


@njit(cache=True, nogil=True)
def decode_run(  # type: ignore[no-untyped-def]
    topk_TLK,
    row_F,
    index_N,
    position_N,
    rank_N,
    steps,
    now,
    deadline,
    expert_LR,
    gpu_LR,
    primary_LR,
    count_L,
    single,
    mode,
    rates,
    terms,
    misc,
    control_L,
    other_terms,
    num_gpus,
    num_experts,
    weight_LE,
    last_LE,
    decay,
    keep,
    since_plan,
    plan_every,
    tally,
    time_IL,
    end_I,
):
    """Up to ``steps`` decode iterations of one batch, ending with the first that ends at or after ``deadline``.

    Row ``index_N + i`` (through ``row_F``) is each request's token of step i. Past loads in ``weight_LE`` (empty:
    nobody asks) are forgotten by ``decay`` a step, ``last_LE`` gets the last step's. Where ``keep`` is active, a
    later step that plans (every ``plan_every``-th, ``since_plan`` went before) and does not keep all plans is left to
    the caller. Returns the number of steps done; fills ``time_IL`` and ``end_I``.
    """
    layers, top = topk_TLK.shape[1], topk_TLK.shape[2]
    size = len(index_N)
    # tokens in order of their ranks, the same in every step
    from_N, rank_T = np.empty(size, np.int64), np.empty(size, np.int64)
    sort_tokens(np.arange(size), np.ones(size, np.int64), rank_N, row_F[:0], num_gpus, from_N, rank_T)
    row_T = np.empty(size, np.int64)
    tokens_E = np.zeros(num_experts, np.int64)
    scratch = np.zeros((6, num_gpus))
    sums_SX = np.zeros((num_gpus, 4))
    for n in range(size):
        sums_SX[rank_N[n], 0] += 1
        sums_SX[rank_N[n], 3] += 1
    gpu_LE = np.zeros((layers, num_experts), np.int64)
    for layer in range(layers):
        for r in range(count_L[layer]):
            gpu_LE[layer, expert_LR[layer, r]] = gpu_LR[layer, r]
    few = single and size * top < num_gpus * num_experts
    none_LSE = np.zeros((0, 0, 0), np.int64)
    all_replicas = count_L.sum()
    kept_L = np.zeros(layers, np.bool_)
    part_LX = np.empty((layers, NUM_PARTS))
    for i in range(steps):
        if keep.active and i > 0 and (since_plan + i) % plan_every == 0:
            every = kept_layers(weight_LE, float(size * top), keep, kept_L)
            if not every:
                return i
        sums_SX[:, 1:3] = 0.0
        for t in range(size):
            n = from_N[t]
            row_T[t] = row_F[index_N[n] + i] if len(row_F) else index_N[n] + i
            # a token attends to its past and itself
            sums_SX[rank_T[t], 1] += position_N[n] + i + 1
            sums_SX[rank_T[t], 2] += position_N[n] + i + 1
        per_layer, once = nonexpert_times(sums_SX, other_terms)
        if few:
            for layer in range(layers):
                expert, exchange, active = _sparse_layer(
                    topk_TLK, row_T, rank_T, layer, gpu_LE[layer], terms, num_gpus, tokens_E, scratch
                )
                time_IL[i, layer] = tally_layer(
                    tally,
                    expert,
                    exchange,
                    misc,
                    0.0,
                    0.0,
                    imbalance(scratch[4]),
                    num_experts,
                    all_replicas,
                    active,
                    num_experts,
                )
                last_LE[layer] = tokens_E
        else:
            time_layers(
                0, layers, none_LSE, topk_TLK, row_T, rank_T, num_experts, expert_LR, gpu_LR, primary_LR, count_L, mode,
                rates, terms, num_gpus, part_LX, last_LE,
            )  # fmt: skip
            tally_layers(part_LX, count_L, num_experts, misc, control_L, tally, time_IL[i])
        if len(weight_LE):
            for layer in range(layers):
                for e in range(num_experts):
                    weight_LE[layer, e] *= decay
                    weight_LE[layer, e] += last_LE[layer, e]
        for layer in range(layers):
            now += time_IL[i, layer]
        now += layers * per_layer + once
        end_I[i] = now
        if now >= deadline:
            return i + 1
    return steps
