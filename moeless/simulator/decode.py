"""Steady decode steps of one batch, timed ahead on as many cores as pay and then gone through on the clock.

Axes: I steps, L layers, E experts, N requests, T tokens in order of their ranks, X what a layer or a step leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import FloatArray, IntArray, Phase
from moeless.costs.nonexpert import NonExpertTerms
from moeless.placement.keep_kernels import KeepTerms
from moeless.placement.threads import in_parallel
from moeless.policy import ResolvedPolicy
from moeless.policy.history import DECAY, LoadHistory
from moeless.simulator.decode_kernels import run_steps, time_steps
from moeless.simulator.layer_kernels import CHOSEN
from moeless.simulator.plan_rows import Plans
from moeless.simulator.record import LayerRecord
from moeless.simulator.single_kernels import NUM_PARTS

#: What deciding one layer's dispatch takes, in expert loads looked at (see ``placement.threads``).
DISPATCH_WORK = 2000
#: Steps timed ahead: as many as have so many expert loads together, which a core's cache holds, within these bounds.
_LOADS, _LEAST, _MOST = 2**18, 16, 512
#: Steps timed ahead after one that did not keep its plans, at least.
_FEW = 3


def dispatch_work(plans: Plans, experts: int, mode: int | None) -> int:
    """What deciding the dispatch of one iteration's layers takes, in expert loads looked at."""
    return DISPATCH_WORK * int((plans.count_L > experts).sum()) if mode == CHOSEN else 0


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


class DecodeSteps:
    """A policy's steady decode steps; how many are worth timing ahead is learnt from those before.

    Args:
        mode, rates: the policy's dispatch, as in ``layer_kernels.time_layer``.
        control_L, misc: seconds of each layer beside its experts and its exchange.
        keep: which forecasts leave plans as they are.
    """

    def __init__(
        self, runtime: ResolvedPolicy, history: LoadHistory, record: LayerRecord, keep: KeepTerms, plan_every: int,
        mode: int, rates: tuple[float, ...], control_L: FloatArray, misc: float,
    ) -> None:  # fmt: skip
        self.runtime, self.history, self.record, self.keep = runtime, history, record, keep
        self.plan_every, self._mode, self._rates = plan_every, mode, rates
        self._control_L, self._misc = control_L, misc
        self._learns = runtime.planner.cadence != "once"
        self._terms, spec = runtime.costs.kernel_terms(), runtime.spec
        most = min(max(_LOADS // (spec.L * spec.E), _LEAST), _MOST)
        self._part_ILX = np.empty((most, spec.L, NUM_PARTS))
        self._other_IX = np.empty((most, 2))
        self._load_ILE = np.empty((most if self._learns else 0, spec.L, spec.E), np.int64)
        # seconds of a step, and steps in a row that kept their plans, as lately seen
        self._pace, self._kept = np.inf, _LEAST

    def run(
        self, batch: Batch, steps: int, now: float, deadline: float, plans: Plans, gpu_LE: IntArray,
        other: NonExpertTerms, since_plan: int,
    ) -> FloatArray:  # fmt: skip
        """Up to ``steps`` steps under warm plans, ending with the first that ends at or after ``deadline``.

        Returns when each ended, ``[I]``. A later step whose forecasts do not leave all plans as they are is not run.
        """
        spec, gpus = self.runtime.spec, self.runtime.cluster.G
        order_T = np.argsort(batch.rank_N, kind="stable")
        index_T, position_T, rank_T = batch.index_N[order_T], batch.position_N[order_T], batch.rank_N[order_T]
        work = spec.L * (spec.E + len(rank_T) * spec.K) + dispatch_work(plans, spec.E, self._mode)
        weight_LE = self.history.weight_LE if self._learns else self.history.weight_LE[:0]
        time_IL, end_I, done = np.empty((steps, spec.L)), np.empty(steps), 0
        while done == 0 or (done < steps and now < deadline):
            ahead = min(steps - done, self._worth(done, now, deadline, since_plan))
            part_ILX, other_IX, load_ILE = self._part_ILX[:ahead], self._other_IX[:ahead], self._load_ILE[:ahead]

            def some(start: int, stop: int, first: int = done) -> None:
                time_steps(
                    start, stop, first, batch.topk_TLK, batch.row_F, index_T, position_T, rank_T, spec.E, plans, gpu_LE,
                    self._mode, self._rates, self._terms, other, gpus, self._part_ILX, self._other_IX, self._load_ILE,
                )  # fmt: skip

            in_parallel(some, ahead, ahead * work)
            ran = run_steps(
                done, now, deadline, part_ILX, other_IX, load_ILE, plans, spec.E, self._misc, self._control_L,
                weight_LE, DECAY, self.keep, float(len(rank_T) * spec.K), since_plan, self.plan_every,
                self.record.tally, time_IL[done : done + ahead], end_I[done : done + ahead],
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
        if self.keep.active:
            # until the next step that plans, none can end the run
            safe = -(since_plan + done) % self.plan_every or (self.plan_every if done == 0 else 0)
            ahead = min(ahead, max(safe, self._kept))
        return ahead
