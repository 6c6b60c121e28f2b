"""Compiled steady decode steps: many of them timed ahead, then gone through on the clock.

What a step's layers take depends on its tokens and on the plans in force, not on when it begins, so that steps are
timed in any order and by several threads (``decode.DecodeSteps``). Sums of floating-point numbers are then made step by
step, so that results have the same bytes however the steps were shared out.

Axes: I steps, L layers, E experts, N requests of the batch, T their tokens in order of the ranks, S source ranks.
"""

from __future__ import annotations

import numpy as np

from moeless.costs.nonexpert import nonexpert_times
from moeless.jit import njit
from moeless.placement.keep_kernels import kept_layers
from moeless.simulator.kernels import tally_layers, time_some
from moeless.simulator.layer_kernels import memory


@njit(cache=True, nogil=True)
def time_steps(  # type: ignore[no-untyped-def]
    start, stop, first, topk_TLK, row_F, index_T, position_T, rank_T, experts, plans, gpu_LE, mode, rates, terms,
    other_terms, num_gpus, part_ILX, other_IX, load_ILE,
):  # fmt: skip
    """Steps ``first + start`` to ``first + stop`` of a batch, into rows ``start`` to ``stop`` of the last three.

    Args:
        topk_TLK, row_F: row ``index_T + i`` (through ``row_F`` where it is not empty) is each request's token of step
            i, at ``position_T + i`` of it; ``rank_T`` ascend.
        plans, gpu_LE, mode, rates: as in ``kernels.time_layers``.
        part_ILX, load_ILE: what layers take, and their loads (no rows: nobody asks).
        other_IX: seconds outside the experts, per layer and once.
    """
    size, layers = len(index_T), topk_TLK.shape[1]
    m = memory(num_gpus, experts, plans.count_L.max(), num_gpus, terms.island_size, size * topk_TLK.shape[2])
    none_LSE = np.zeros((0, 0, 0), np.int64)
    row_T, own_LE = np.empty(size, np.int64), np.empty((layers, experts), np.int64)
    sums_SX = np.zeros((num_gpus, 4))
    for t in range(size):
        sums_SX[rank_T[t], 0] += 1
        sums_SX[rank_T[t], 3] += 1
    for at in range(start, stop):
        i = first + at
        sums_SX[:, 1:3] = 0.0
        for t in range(size):
            row_T[t] = row_F[index_T[t] + i] if len(row_F) else index_T[t] + i
            # a token attends to its past and itself
            sums_SX[rank_T[t], 1] += position_T[t] + i + 1
            sums_SX[rank_T[t], 2] += position_T[t] + i + 1
        other_IX[at, 0], other_IX[at, 1] = nonexpert_times(sums_SX, other_terms)
        time_some(
            0, layers, none_LSE, topk_TLK, row_T, rank_T, plans, gpu_LE, mode, rates, terms, num_gpus, m,
            part_ILX[at], load_ILE[at] if len(load_ILE) else own_LE,
        )  # fmt: skip


@njit(cache=True, nogil=True)
def run_steps(  # type: ignore[no-untyped-def]
    first, now, deadline, part_ILX, other_IX, load_ILE, plans, experts, misc, control_L, weight_LE, decay, keep,
    assignments, since_plan, plan_every, tally, time_IL, end_I,
):  # fmt: skip
    """Go through timed steps, ending with the first that ends at or after ``deadline``; returns how many were run.

    Past loads in ``weight_LE`` (no rows: nobody asks) are forgotten by ``decay`` a step. Where ``keep`` is active, a
    step that plans (every ``plan_every``-th, ``since_plan`` went before the batch's first) and does not keep all plans
    is left to the caller, except the batch's first. Fills ``time_IL`` and ``end_I``.
    """
    steps, layers = time_IL.shape
    kept_L = np.zeros(layers, np.bool_)
    for at in range(steps):
        i = first + at
        if keep.active and i > 0 and (since_plan + i) % plan_every == 0:
            every = kept_layers(weight_LE, assignments, keep, kept_L)
            if not every:
                return at
        tally_layers(part_ILX[at], plans, experts, misc, control_L, tally, time_IL[at])
        if len(weight_LE):
            for layer in range(layers):
                for e in range(experts):
                    weight_LE[layer, e] *= decay
                    weight_LE[layer, e] += load_ILE[at, layer, e]
        for layer in range(layers):
            now += time_IL[at, layer]
        now += layers * other_IX[at, 0] + other_IX[at, 1]
        end_I[at] = now
        if now >= deadline:
            return at + 1
    return steps
