"""Steady decode steps of one batch: timed ahead on as many cores as pay, and then gone through on the clock.

What a step's layers take depends on its tokens and on the plans in force, not on when it begins, so that steps are
timed in any order and by several threads. Sums of floating-point numbers are then made step by step, so that results
have the same bytes however the steps were shared out.

Axes: I steps, L layers, E experts, N requests of the batch, T their tokens in order of the ranks, S source ranks,
X what a layer or a step leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import FloatArray, IntArray, Phase
from moeless.costs.nonexpert import NonExpertTerms, nonexpert_times
from moeless.jit import njit
from moeless.placement.plan_reuse import ReuseTerms, history_keeps_plans
from moeless.placement.plan_rows import PlanRows
from moeless.placement.threads import in_parallel
from moeless.policy import ResolvedPolicy
from moeless.policy.history import DECAY, LoadHistory
from moeless.simulator.layer_timing import memory, time_some
from moeless.simulator.record import LayerRecord
from moeless.simulator.tally import NUM_PARTS, tally_layers

#: What deciding one layer's dispatch takes, in expert loads looked at (see ``placement.threads``).
DISPATCH_WORK = 2000
#: Steps timed ahead: as many as have so many expert loads together, which a core's cache holds, within these bounds.
_LOADS, _LEAST, _MOST = 2**18, 16, 512
#: Steps timed ahead after one that did not keep its plans, at least.
_FEW = 3


@dataclass(frozen=True)
class Batch:
    """Requests that decode together, and where their tokens are routed.

    ``index_N + i`` (through ``row_F`` where it is not empty) is each request's row of ``topk_TLK`` in step i.
    """

    topk_TLK: NDArray[np.uint16]
    row_F: NDArray[np.unsignedinteger]
    index_N: IntArray
    position_N: IntArray
    rank_N: IntArray


class SteadySteps:
    """A policy's steady decode steps; how many are worth timing ahead is learnt from those before.

    Args:
        rule, numbers: the policy's compiled dispatch.
        control_L: seconds of each layer's decisions after the gate.
        reuse: which forecasts leave plans as they are.
    """

    def __init__(
        self, policy: ResolvedPolicy, history: LoadHistory, record: LayerRecord, reuse: ReuseTerms, plan_every: int,
        rule: Any, numbers: FloatArray, control_L: FloatArray,
    ) -> None:  # fmt: skip
        self.policy, self.history, self.record, self.reuse = policy, history, record, reuse
        self.plan_every, self._rule, self._numbers, self._control_L = plan_every, rule, numbers, control_L
        self._learns = policy.planner.cadence != "once"
        self._costs, spec = policy.costs.layer_costs, policy.spec
        most = min(max(_LOADS // (spec.L * spec.E), _LEAST), _MOST)
        self._part_ILX = np.zeros((most, spec.L, NUM_PARTS))
        self._other_IX = np.empty((most, 2))
        self._load_ILE = np.empty((most if self._learns else 0, spec.L, spec.E), np.int64)
        # seconds of a step, and steps in a row that kept their plans, as lately seen
        self._pace, self._kept = np.inf, _LEAST

    def run(
        self, batch: Batch, steps: int, now: float, deadline: float, plans: PlanRows, gpu_LE: IntArray,
        other: NonExpertTerms, since_plan: int, dispatch_work: int,
    ) -> FloatArray:  # fmt: skip
        """Up to ``steps`` steps under warm plans, ending with the first that ends at or after ``deadline``.

        ``dispatch_work`` is what deciding the dispatch of one step takes, in expert loads looked at.

        Returns when each ended, ``[I]``. A later step whose forecasts do not leave all plans as they are is not run.
        """
        spec = self.policy.spec
        order_T = np.argsort(batch.rank_N, kind="stable")
        index_T, position_T, rank_T = batch.index_N[order_T], batch.position_N[order_T], batch.rank_N[order_T]
        work = spec.L * (spec.E + len(rank_T) * spec.K) + dispatch_work
        weight_LE = self.history.weight_LE if self._learns else self.history.weight_LE[:0]
        time_IL, end_I, done = np.empty((steps, spec.L)), np.empty(steps), 0
        while done == 0 or (done < steps and now < deadline):
            ahead = min(steps - done, self._worth(done, now, deadline, since_plan))
            part_ILX, other_IX, load_ILE = self._part_ILX[:ahead], self._other_IX[:ahead], self._load_ILE[:ahead]

            def some(start: int, stop: int, first: int = done) -> None:
                time_steps(
                    start, stop, first, batch.topk_TLK, batch.row_F, index_T, position_T, rank_T, spec.E, plans, gpu_LE,
                    self._rule, self._numbers, self._control_L, self._costs, other, self._part_ILX, self._other_IX,
                    self._load_ILE,
                )  # fmt: skip

            in_parallel(some, ahead, ahead * work)
            ran = run_steps(
                done, now, deadline, part_ILX, other_IX, load_ILE, plans.count_N, self._costs, weight_LE, DECAY,
                self.reuse, float(len(rank_T) * spec.K), since_plan, self.plan_every, self.record.tally,
                time_IL[done : done + ahead], end_I[done : done + ahead],
            )  # fmt: skip
            if ran:
                self._pace = (end_I[done + ran - 1] - now) / ran
                now = float(end_I[done + ran - 1])
                if self._learns:
                    self.history.add_steps(self._load_ILE[:ran], Phase.DECODE, len(rank_T))
                else:
                    self.history.count(ran, ran * len(rank_T))
            done += ran
            if ran < ahead:
                if now < deadline:
                    self._kept = max(done // 2, _FEW)
                break
            self._kept = max(self._kept, 2 * done)
        self.record.append(time_IL[:done])
        return end_I[:done]

    def _worth(self, done: int, now: float, deadline: float, since_plan: int) -> int:
        """How many steps to time ahead, so that hardly any of them is in vain."""
        ahead = len(self._part_ILX)
        if self._pace < np.inf and deadline < np.inf:
            ahead = min(ahead, max(int((deadline - now) / self._pace), 0) + 2)
        elif deadline < np.inf:
            ahead = min(ahead, _LEAST)
        if self.reuse.active:
            # until the next step that plans, none can end the run
            safe = -(since_plan + done) % self.plan_every or (self.plan_every if done == 0 else 0)
            ahead = min(ahead, max(safe, self._kept))
        return ahead


@njit(cache=True, nogil=True)
def time_steps(  # type: ignore[no-untyped-def]
    start, stop, first, topk_TLK, row_F, index_T, position_T, rank_T, experts, plans, gpu_LE, rule, numbers, control_L,
    costs, other_terms, part_ILX, other_IX, load_ILE,
):  # fmt: skip
    """Steps ``first + start`` to ``first + stop`` of a batch, into rows ``start`` to ``stop`` of the last three.

    Args:
        topk_TLK, row_F: row ``index_T + i`` (through ``row_F`` where it is not empty) is each request's token of step
            i, at ``position_T + i`` of it; ``rank_T`` ascend.
        plans, gpu_LE, rule, numbers: as in ``layer_timing.time_layers``.
        part_ILX, load_ILE: what layers take, and their loads (no rows: nobody asks).
        other_IX: seconds outside the experts, per layer and once.
    """
    size, layers, gpus = len(index_T), topk_TLK.shape[1], len(costs.island_G)
    m = memory(gpus, experts, plans.expert_NR.shape[1], gpus, size * topk_TLK.shape[2])
    row_T, own_LE = np.empty(size, np.int64), np.empty((layers, experts), np.int64)
    layer_N, sums_SX = np.arange(layers), np.zeros((gpus, 4))
    for t in range(size):
        sums_SX[rank_T[t], 0] += 1
        sums_SX[rank_T[t], 3] += 1
    for at in range(start, stop):
        i = first + at
        for s in range(gpus):
            sums_SX[s, 1], sums_SX[s, 2] = 0.0, 0.0
        for t in range(size):
            row_T[t] = row_F[index_T[t] + i] if len(row_F) else index_T[t] + i
            # a token attends to its past and itself
            sums_SX[rank_T[t], 1] += position_T[t] + i + 1
            sums_SX[rank_T[t], 2] += position_T[t] + i + 1
        other_IX[at, 0], other_IX[at, 1] = nonexpert_times(sums_SX, other_terms)
        time_some(
            0, layers, layer_N, topk_TLK, row_T, rank_T, plans, gpu_LE, rule, numbers, control_L, costs, m,
            part_ILX[at], load_ILE[at] if len(load_ILE) else own_LE,
        )  # fmt: skip


@njit(cache=True, nogil=True)
def run_steps(  # type: ignore[no-untyped-def]
    first, now, deadline, part_ILX, other_IX, load_ILE, count_L, costs, weight_LE, decay, reuse, assignments,
    since_plan, plan_every, tally, time_IL, end_I,
):  # fmt: skip
    """Go through timed steps, ending with the first that ends at or after ``deadline``; returns how many were run.

    Past loads in ``weight_LE`` (no rows: nobody asks) are forgotten by ``decay`` a step. Where ``reuse`` is active, a
    step that plans (every ``plan_every``-th, ``since_plan`` went before the batch's first) and does not keep all plans
    is left to the caller, except the batch's first. Fills ``time_IL`` and ``end_I``.
    """
    steps, layers = time_IL.shape
    experts, all_replicas = weight_LE.shape[1], 0
    for layer in range(layers):
        all_replicas += count_L[layer]
    kept_L = np.zeros(layers, np.bool_)
    for at in range(steps):
        i = first + at
        if reuse.active and i > 0 and (since_plan + i) % plan_every == 0:
            every = history_keeps_plans(weight_LE, assignments, reuse, kept_L)
            if not every:
                return at
        tally_layers(part_ILX[at], all_replicas, costs, tally, time_IL[at])
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
