"""Which plans stay for another iteration, so that their planner need not be asked."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeless.contracts import BoolArray, FloatArray, Forecast, IntArray, LayerPlan
from moeless.placement.base import PlannerInUse
from moeless.placement.plan_reuse import history_keeps_plans, keeps_plan, keeps_plans, never, note_plans
from moeless.placement.plan_rows import PlanRows, rows_of


class PlanReuse:
    """Memory of the forecasts that a policy's plans were made for, see :mod:`moeless.placement.plan_reuse`.

    Attributes:
        terms: what compiled loops ask; its arrays are updated in place.
        steps: the same for steady decode steps, active only where their forecasts come from history.
    """

    def __init__(self, policy: PlannerInUse, predictor: Any) -> None:
        planner, spec = policy.planner, policy.spec
        asked = predictor is not None and planner.reuse is not None
        self.terms = planner.reuse(policy.setting) if asked and planner.reuse else never(spec.L, spec.E)
        known = self.terms.active and predictor.from_history
        self.steps = self.terms if known else never(spec.L, spec.E)

    def keeps(self, layer: int, forecast: Forecast) -> bool:
        """Whether a layer's plan stays for this forecast."""
        return bool(keeps_plan(layer, forecast.mean_E, forecast.var_E, self.terms))

    def kept_N(self, layer_N: IntArray, mean_NE: FloatArray, var_NE: FloatArray) -> BoolArray:
        """Which of these layers' plans stay for their forecasts."""
        kept_N = np.zeros(len(layer_N), np.bool_)
        if self.terms.active:
            keeps_plans(layer_N, mean_NE, var_NE, self.terms, kept_N)
        return kept_N

    def kept_by_history(self, weight_LE: FloatArray, assignments: float) -> BoolArray:
        """Which layers' plans stay for forecasts from these past loads, ``[L]``."""
        kept_L = np.zeros(len(weight_LE), np.bool_)
        if self.steps.active:
            history_keeps_plans(weight_LE, float(assignments), self.steps, kept_L)
        return kept_L

    def note(self, layer_N: IntArray, mean_NE: FloatArray, rows: PlanRows) -> None:
        """Plans were made for these forecasts."""
        if self.terms.active:
            note_plans(layer_N, mean_NE, rows, self.terms)

    def note_plan(self, forecast: Forecast, plan: LayerPlan) -> None:
        """A plan was made for this forecast."""
        self.note(np.array([plan.layer]), forecast.mean_E[None], rows_of([plan]))

    def forget(self) -> None:
        """Plans were changed for another reason than a forecast."""
        self.terms.planned_LE[:] = 0.0
        self.terms.plain_L[:] = False
