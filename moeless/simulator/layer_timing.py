"""Compiled time of single layers, straight from their tokens: how they are dealt, and what that takes.

Axes: L layers, S source ranks (rank s is GPU s), E experts, K experts per token, T tokens in order of their ranks,
R replicas in a plan's order, G GPUs, X the columns of a layer's run (``tally``).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeless.compiled_call import call_at
from moeless.contracts import BoolArray, FloatArray, IntArray
from moeless.costs.layer_time import (
    LOAD,
    ExchangeLoad,
    add_copy,
    add_rows,
    exchange_seconds,
    gpu_seconds,
    slowest,
    traffic_seconds,
)
from moeless.jit import njit
from moeless.placement.dealing import (
    Dealt,
    LayerCopies,
    LayerLoad,
    Traffic,
    deal_by_shares,
    deal_to_homes,
    room_for_load,
    room_for_rows,
    room_for_traffic,
    sort_copies,
    take_tokens,
)
from moeless.simulator.tally import (
    ACTIVE_PART,
    CONTROL_PART,
    EXCHANGE_PART,
    EXPERT_PART,
    IMBALANCE_PART,
    REPLICAS_PART,
    STALL_PART,
    WARM_PART,
)


class Memory(NamedTuple):
    """What the timing of layers works in; whatever it holds.

    Attributes:
        table_SE: a table of loads where that is smaller than a list of the tokens, else of no rows.
        serving_R, first_E, by_expert_R, home_E: of :class:`~moeless.placement.dealing.LayerCopies`.
        ready_E: when the first copy of each expert is warm.
        count_3G: of layers with one copy of each expert a GPU's tokens, those from itself, those from other islands.
    """

    load: LayerLoad
    table_SE: IntArray
    serving_R: BoolArray
    first_E: IntArray
    by_expert_R: IntArray
    home_E: IntArray
    dealt: Dealt
    traffic: Traffic
    ready_E: FloatArray
    count_3G: IntArray


_ALL, _LOCAL, _FAR = 0, 1, 2


@njit(cache=True, nogil=True)
def memory(sources, experts, replicas, gpus, assignments):  # type: ignore[no-untyped-def]
    """Enough for any layer of up to so many replicas and of so many tokens, each expert of a token counted."""
    return Memory(
        room_for_load(experts, min(sources * experts, assignments)),
        np.empty((sources if sources * experts <= assignments else 0, experts), np.int64),
        np.ones(replicas, np.bool_),
        np.empty(experts + 1, np.int64),
        np.empty(replicas, np.int64),
        np.empty(experts, np.int64),
        room_for_rows(assignments + replicas),
        room_for_traffic(replicas, gpus),
        np.empty(experts),
        np.empty((3, gpus), np.int64),
    )


@njit(cache=True, nogil=True, allocates=False)
def survey(plans, ready_LEG, gpu_LE):  # type: ignore[no-untyped-def]
    """What matters of plans until they change.

    Args:
        ready_LEG: when each copy is warm; infinity where it is on no way to it.
        gpu_LE: filled with the GPU of each expert, in layers with one copy of each; others' rows are of no use.

    Returns:
        Copies in all plans, layers with more than one copy of an expert, those of them whose shares are not fixed, and
        when the last copy is warm.
    """
    expert_LR, gpu_LR, experts = plans.expert_NR, plans.gpu_NR, gpu_LE.shape[1]
    replicas, several, deciding, last = 0, 0, 0, 0.0
    for layer in range(len(gpu_LE)):
        count = plans.count_N[layer]
        replicas += count
        several += count > experts
        deciding += count > experts and not plans.fixed_N[layer]
        for r in range(count):
            e, g = expert_LR[layer, r], gpu_LR[layer, r]
            gpu_LE[layer, e] = g
            last = max(last, ready_LEG[layer, e, g])
    return replicas, several, deciding, last


@njit(cache=True, nogil=True, allocates=False, inner=True)
def single_layers(start, stop, topk_TLK, row_T, rank_T, gpu_LE, costs, m, part_LX, load_LE):  # type: ignore[no-untyped-def]
    """Layers ``start`` to ``stop`` whose experts have one copy each, into ``part_LX`` and ``load_LE``.

    Nothing is left to decide, so that no rows are written. All in one function: each array handed to another costs as
    much as a few tokens.

    Args:
        row_T, rank_T: rows of ``topk_TLK`` and source ranks of the tokens, the ranks ascending.
        gpu_LE: where each expert is, as :func:`survey` fills it.
    """
    top, tokens, experts = topk_TLK.shape[2], len(row_T), load_LE.shape[1]
    active_E, seconds_G, count_3G, island_G = m.first_E, m.traffic.seconds_G, m.count_3G, costs.island_G
    num_gpus, tables = len(seconds_G), len(costs.tables.tokens_N) > 0
    many = num_gpus > costs.island_size
    mean = tokens * top / num_gpus
    for layer in range(start, stop):
        for e in range(experts):
            load_LE[layer, e] = 0
        for g in range(num_gpus):
            count_3G[_ALL, g], count_3G[_LOCAL, g], count_3G[_FAR, g] = 0, 0, 0
            seconds_G[g] = 0.0
        most_near, most_far, most_others, others, most_sent, t = 0, 0, 0, 0, 0, 0
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
            sent = (t - first) * top
            most_far, most_near = max(most_far, far), max(most_near, sent - local - far)
            most_others, others, most_sent = max(most_others, sent - local), others + sent - local, max(most_sent, sent)
        active = 0
        for e in range(experts):
            # written whatever it is: a branch would be taken at random
            active_E[active] = e
            active += load_LE[layer, e] > 0
        for i in range(active):
            e = active_E[i]
            g = gpu_LE[layer, e]
            count_3G[_ALL, g] += load_LE[layer, e]
            if not tables:
                add_copy(load_LE[layer, e], g, costs, seconds_G)
        most = 0
        for g in range(num_gpus):
            n, beyond, local = count_3G[_ALL, g], count_3G[_FAR, g], count_3G[_LOCAL, g]
            most, most_far = max(most, n), max(most_far, beyond)
            most_near, most_others = max(most_near, n - local - beyond), max(most_others, n - local)
        if tables:
            gpu_seconds(load_LE[layer], gpu_LE[layer], costs, seconds_G, m.traffic.work_W)
            expert = slowest(seconds_G)
        else:
            expert = slowest(seconds_G)
            expert += costs.launch_seconds if expert > 0.0 else 0.0
        load = ExchangeLoad(
            float(most_near), float(most_far), float(most_others), float(others), float(most), float(most_sent)
        )
        part_LX[layer, EXPERT_PART], part_LX[layer, EXCHANGE_PART] = expert, exchange_seconds(load, costs)
        part_LX[layer, IMBALANCE_PART] = most / mean if mean > 0 else 1.0
        part_LX[layer, ACTIVE_PART] = active
        part_LX[layer, CONTROL_PART], part_LX[layer, STALL_PART] = 0.0, 0.0
        part_LX[layer, REPLICAS_PART], part_LX[layer, WARM_PART] = experts, experts


@njit(cache=True, nogil=True, allocates=False, inner=True)
def time_dealt(layer, plans, rule, numbers, control, costs, m, part_X):  # type: ignore[no-untyped-def]
    """One layer by its tokens in ``m.load`` and its serving copies in ``m.serving_R``, into ``part_X``.

    The rule is asked where an expert has several copies whose shares are not fixed ahead; only then are its decisions
    charged ``control`` seconds.
    """
    n, experts = plans.count_N[layer], len(m.home_E)
    expert_R, gpu_R, primary_R = plans.expert_NR[layer, :n], plans.gpu_NR[layer, :n], plans.primary_NR[layer, :n]
    traffic_QG, num_gpus = m.traffic.traffic_QG, m.traffic.traffic_QG.shape[1]
    serving_R, first_E, by_expert_R, home_E = m.serving_R[:n], m.first_E, m.by_expert_R[:n], m.home_E
    sort_copies(expert_R, primary_R, serving_R, first_E, by_expert_R, home_E)
    copies = LayerCopies(expert_R, gpu_R, primary_R, serving_R, first_E, by_expert_R, home_E, num_gpus)
    decides = False
    if n == experts:
        rows = deal_to_homes(m.load, copies, m.dealt)
    elif plans.fixed_N[layer]:
        rows = deal_by_shares(m.load, copies, plans.share_NR[layer, :n], m.dealt)
    else:
        decides = True
        rows = call_at(rule, m.load, copies, numbers, costs, m.dealt)
    tokens_R = m.traffic.tokens_R[:n]
    active = add_rows(
        m.dealt.source_X, m.dealt.copy_X, m.dealt.tokens_X, rows, gpu_R, costs.island_G, tokens_R, traffic_QG
    )
    expert, exchange = traffic_seconds(tokens_R, gpu_R, traffic_QG, costs, m.traffic.seconds_G, m.traffic.work_W)
    fill_parts(expert, exchange, control if decides else 0.0, active, n, traffic_QG, part_X)


@njit(cache=True, nogil=True, allocates=False, inner=True)
def fill_parts(expert, exchange, control, active, replicas, traffic_QG, part_X):  # type: ignore[no-untyped-def]
    """A layer's run, all its copies warm."""
    most, total, gpus = 0.0, 0.0, traffic_QG.shape[1]
    for g in range(gpus):
        most, total = max(most, traffic_QG[LOAD, g]), total + traffic_QG[LOAD, g]
    part_X[EXPERT_PART], part_X[EXCHANGE_PART], part_X[CONTROL_PART] = expert, exchange, control
    part_X[IMBALANCE_PART] = most / (total / gpus) if total > 0 else 1.0
    part_X[STALL_PART], part_X[ACTIVE_PART] = 0.0, active
    part_X[REPLICAS_PART], part_X[WARM_PART] = replicas, replicas


@njit(cache=True, nogil=True, allocates=False, inner=True)
def time_some(  # type: ignore[no-untyped-def]
    start, stop, layer_N, topk_TLK, row_T, rank_T, plans, gpu_LE, rule, numbers, control_L, costs, m, part_LX, load_LE
):
    """:func:`time_layers` in given memory."""
    experts, at = load_LE.shape[1], start
    for r in range(len(m.serving_R)):
        m.serving_R[r] = True
    while at < stop:
        layer, after = layer_N[at], at
        while after < stop and layer_N[after] == layer + after - at and plans.count_N[layer_N[after]] == experts:
            after += 1
        if after > at:
            single_layers(layer, layer + after - at, topk_TLK, row_T, rank_T, gpu_LE, costs, m, part_LX, load_LE)
            at = after
            continue
        take_tokens(topk_TLK, row_T, rank_T, layer, m.table_SE, m.load)
        time_dealt(layer, plans, rule, numbers, control_L[layer], costs, m, part_LX[layer])
        for e in range(experts):
            load_LE[layer, e] = m.load.tokens_E[e]
        at += 1


@njit(cache=True, nogil=True)
def time_layers(  # type: ignore[no-untyped-def]
    start, stop, layer_N, topk_TLK, row_T, rank_T, plans, gpu_LE, rule, numbers, control_L, costs, part_LX, load_LE
):
    """The layers ``layer_N[start:stop]`` of one iteration with all copies warm, into their rows of the last two.

    Args:
        layer_N: ascending.
        topk_TLK, row_T, rank_T: the tokens' experts, rows and source ranks, the ranks ascending.
        gpu_LE: as :func:`survey` fills it.
        rule, numbers: the planner's dispatch rule, as ``DispatchRule.address`` tells, and its numbers.
    """
    gpus, experts, widest = len(costs.island_G), load_LE.shape[1], plans.expert_NR.shape[1]
    m = memory(gpus, experts, widest, gpus, len(row_T) * topk_TLK.shape[2])
    time_some(
        start, stop, layer_N, topk_TLK, row_T, rank_T, plans, gpu_LE, rule, numbers, control_L, costs, m, part_LX,
        load_LE,
    )  # fmt: skip
