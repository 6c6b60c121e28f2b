"""Plans of several layers as padded rows, what planners of many layers take and give, and their other forms.

Axes: N layers of a batch, R replicas in a plan's order (padded), P a previous plan's replicas, layer after layer,
E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import (
    BoolArray,
    FloatArray,
    Forecast,
    InstanceState,
    Int32Array,
    IntArray,
    LayerPlan,
    Phase,
    PlanInput,
)
from moeless.errors import UserError


class PlanRows(NamedTuple):
    """A plan in each row.

    Attributes:
        count_N: replicas of each plan.
        share_NR: each copy's part of its expert's tokens, in the rows of ``fixed_N``.
    """

    expert_NR: Int32Array
    gpu_NR: Int32Array
    primary_NR: BoolArray
    count_N: IntArray
    share_NR: FloatArray
    fixed_N: BoolArray

    @property
    def widest(self) -> int:
        """Replicas that a row has room for."""
        return int(self.expert_NR.shape[1])

    def plan(self, row: int, layer: int) -> LayerPlan:
        """One row as a layer's plan."""
        n = int(self.count_N[row])
        return LayerPlan(
            layer,
            self.expert_NR[row, :n].copy(),
            self.gpu_NR[row, :n].copy(),
            self.primary_NR[row, :n].copy(),
            self.share_NR[row, :n].copy() if self.fixed_N[row] else None,
        )

    def put(self, row: int, plan: LayerPlan) -> None:
        """Write a plan that has room into a row."""
        n = self.count_N[row] = plan.R
        self.expert_NR[row, :n], self.gpu_NR[row, :n] = plan.expert_R, plan.gpu_R
        self.primary_NR[row, :n] = plan.primary_R
        self.fixed_N[row] = plan.share_R is not None
        if plan.share_R is not None:
            self.share_NR[row, :n] = plan.share_R

    def widened(self, widest: int) -> PlanRows:
        """The same plans with room for so many replicas."""
        rows = empty_rows(len(self.count_N), widest)
        for row in range(len(self.count_N)):
            rows.put(row, self.plan(row, row))
        return rows


def empty_rows(count: int, widest: int) -> PlanRows:
    """Rows for plans of at most ``widest`` replicas."""
    shape = (count, widest)
    return PlanRows(
        np.empty(shape, np.int32),
        np.empty(shape, np.int32),
        np.empty(shape, np.bool_),
        np.zeros(count, np.int64),
        np.empty(shape),
        np.zeros(count, np.bool_),
    )


def rows_of(plans: Sequence[LayerPlan], widest: int = 0) -> PlanRows:
    """Plans as rows, with room for ``widest`` replicas at least."""
    rows = empty_rows(len(plans), max(widest, *(plan.R for plan in plans)) if plans else widest)
    for row, plan in enumerate(plans):
        rows.put(row, plan)
    return rows


class PreviousCopies(NamedTuple):
    """The copies that a batch's layers have before they are planned, layer after layer, each in a plan's order.

    Copies that linger in memory beside a plan are among them as further extras, without a share.

    Attributes:
        first_N: layer n's copies are ``first_N[n] <= p < first_N[n + 1]``; none: the layer has no plan yet.
        state_P: an :class:`~moeless.contracts.InstanceState` each.
        share_P: parts of their experts' tokens, in the layers of ``fixed_N``.
    """

    first_N: IntArray
    expert_P: Int32Array
    gpu_P: Int32Array
    primary_P: BoolArray
    state_P: NDArray[np.uint8]
    share_P: FloatArray
    fixed_N: BoolArray


@dataclass(frozen=True)
class PlanBatch:
    """What a planner sees of several layers of one iteration, ahead of time; see :class:`~moeless.contracts.PlanInput`.

    Attributes:
        layer_N: the layers.
        mean_NE, var_NE: their forecasts.
        tokens: of the iteration.
        source: where the forecasts come from.
    """

    layer_N: IntArray
    phase: Phase
    mean_NE: FloatArray
    var_NE: FloatArray
    tokens: int
    source: str
    previous: PreviousCopies
    horizon_N: IntArray
    lead_N: FloatArray
    copy_seconds: float | None

    def __len__(self) -> int:
        return len(self.layer_N)

    def input(self, row: int) -> PlanInput:
        """One layer of it, for planners that plan layer by layer."""
        mean_E, var_E = self.mean_NE[row].copy(), self.var_NE[row].copy()
        start, stop = self.previous.first_N[row : row + 2].tolist()
        layer, previous, state_P = int(self.layer_N[row]), None, None
        if stop > start:
            _, expert_P, gpu_P, primary_P, state_P, share_P, fixed_N = self.previous
            share = share_P[start:stop].copy() if fixed_N[row] else None
            of = slice(start, stop)
            previous = LayerPlan(layer, expert_P[of].copy(), gpu_P[of].copy(), primary_P[of].copy(), share)
            state_P = state_P[of].copy()
        return PlanInput(
            layer, self.phase, Forecast(mean_E, var_E, self.tokens, self.source), previous, state_P,
            int(self.horizon_N[row]), float(self.lead_N[row]), self.copy_seconds,
        )  # fmt: skip


def batch_of(inputs: Sequence[PlanInput]) -> PlanBatch:
    """Inputs as a batch.

    Raises:
        UserError: they are of several phases, iterations or times of bringing a copy.
    """
    if len({(x.phase, x.copy_seconds, x.forecast.tokens) for x in inputs}) != 1:
        raise UserError("layers that are planned together must be of one phase, one iteration and one time of copying")
    plans = [x.previous for x in inputs]
    size_N = [0 if plan is None else plan.R for plan in plans]
    first_N = np.concatenate([[0], np.cumsum(size_N)]).astype(np.int64)
    there = [plan for plan in plans if plan is not None]
    states = [
        np.full(x.previous.R, InstanceState.WARM, np.uint8) if x.state_R is None else x.state_R
        for x in inputs
        if x.previous is not None
    ]
    shares = [np.zeros(plan.R) if plan.share_R is None else plan.share_R for plan in there]
    previous = PreviousCopies(
        first_N,
        _joined([plan.expert_R for plan in there], np.int32),
        _joined([plan.gpu_R for plan in there], np.int32),
        _joined([plan.primary_R for plan in there], np.bool_),
        _joined(states, np.uint8),
        _joined(shares, np.float64),
        np.array([plan is not None and plan.share_R is not None for plan in plans], np.bool_),
    )
    first = inputs[0]
    return PlanBatch(
        np.array([x.layer for x in inputs], np.int64),
        first.phase,
        np.stack([np.asarray(x.forecast.mean_E, np.float64) for x in inputs]),
        np.stack([np.asarray(x.forecast.var_E, np.float64) for x in inputs]),
        first.forecast.tokens,
        first.forecast.source,
        previous,
        np.array([x.horizon_iterations for x in inputs], np.int64),
        np.array([x.lead_seconds for x in inputs], np.float64),
        first.copy_seconds,
    )


def _joined(rows: Sequence[Any], kind: Any) -> Any:
    return np.ascontiguousarray(np.concatenate(rows), kind) if rows else np.empty(0, kind)
