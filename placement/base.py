"""What a planner is: a function that plans, a rule that deals tokens to copies, and what both declare of themselves.

Whoever needs to know something of a planner (a cost model that charges for its decisions, the simulator, the live
engine) asks its declarations, never its name: a copy under another name behaves just the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

from moeless.cluster import Cluster
from moeless.contracts import BoolArray, Budget, Forecast, IntArray, LayerPlan, Phase, PlanInput
from moeless.costs import Control, CostModel
from moeless.errors import UserError
from moeless.placement.dispatch import DispatchRule
from moeless.placement.plan_reuse import ReuseTerms
from moeless.placement.plan_rows import PlanBatch, PlanRows, batch_of, rows_of
from moeless.placement.setting import Setting
from moeless.spec import MoESpec

#: When a planner plans: once, every ``replan_seconds``, or before each iteration.
Cadence = Literal["once", "interval", "iteration"]


class PlanLayer(Protocol):
    """Replicas and placement of one layer, ahead of time."""

    def __call__(self, x: PlanInput, setting: Setting) -> LayerPlan: ...


class PlanLayers(Protocol):
    """The plans of several layers, in order, the same as of one after the other."""

    def __call__(self, batch: PlanBatch, setting: Setting) -> PlanRows: ...


class ShareBudget(Protocol):
    """Room of each layer, out of what all layers have together; the setting's budget is an even layer's."""

    def __call__(self, inputs_L: Sequence[PlanInput], setting: Setting) -> list[Budget]: ...


@dataclass(frozen=True, kw_only=True)
class Planner:
    """A planner by name. It plans layer by layer (``plan_layer``) or several layers at once (``plan_layers``).

    Attributes:
        dispatch: the rule that serves its plans. A plain function counts as a rule in Python that gathers counts.
        params: frozen dataclass of the planner's parameters; its defaults are the planner's defaults.
        cadence: when to plan.
        needs_forecast: False where the plan does not depend on a forecast.
        default_predictor: what ``--policy NAME`` alone uses.
        source: paper or repository that the method comes from.
        share_budget: for planners that give some layers more room than others; None where each has the same.
        reuse: for planners whose plans may stay where a forecast hardly changed, see
            :mod:`moeless.placement.plan_reuse`; None where they are to be asked each time.
        holds_extras: False for planners that never have a copy beyond the primaries, whatever the budget.
        timed_as: the entry of a hardware profile's ``control.plan_seconds`` that holds the measured time of planning
            a layer; empty if none does.
    """

    name: str
    dispatch: DispatchRule
    params: type[Any]
    cadence: Cadence
    needs_forecast: bool
    default_predictor: str
    source: str
    plan_layer: PlanLayer | None = None
    plan_layers: PlanLayers | None = None
    share_budget: ShareBudget | None = None
    reuse: Callable[[Setting], ReuseTerms] | None = None
    holds_extras: bool = True
    timed_as: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.dispatch, DispatchRule):
            object.__setattr__(self, "dispatch", DispatchRule(gathers_counts=True, quotas=self.dispatch))
        if (self.plan_layer is None) == (self.plan_layers is None):
            raise UserError(
                f"planner {self.name} plans layer by layer or several at once: give plan_layer or plan_layers"
            )

    def plan(self, x: PlanInput, setting: Setting) -> LayerPlan:
        """One layer's plan.

        Raises:
            UserError: the planner refuses the budget.
        """
        if self.plan_layer is not None:
            return self.plan_layer(x, setting)
        return self.plan_many(batch_of([x]), setting).plan(0, x.layer)

    def plan_many(self, batch: PlanBatch, setting: Setting) -> PlanRows:
        """The plans of several layers, in the batch's order.

        Raises:
            UserError: the planner refuses the budget, or a layer is none of the model's.
        """
        if len(batch) and not 0 <= batch.layer_N.min() <= batch.layer_N.max() < setting.spec.L:
            raise UserError(
                f"{setting.spec.name} has {setting.spec.L} MoE layers; plans were asked for {batch.layer_N}"
            )
        if self.plan_layers is not None:
            return self.plan_layers(batch, setting)
        return rows_of([self.plan(batch.input(row), setting) for row in range(len(batch))])

    @property
    def control(self) -> Control:
        """What cost models charge for its decisions while requests are served."""
        return replace(self.dispatch.control, plans_ahead=self.cadence == "iteration", planning_timed_as=self.timed_as)

    def plan_all(self, inputs_L: Sequence[PlanInput], setting: Setting) -> list[LayerPlan]:
        """Plan all layers of a model at one time, each within the budget or what the planner makes of it for all.

        Raises:
            UserError: the planner refuses the budget.
        """
        if not inputs_L:
            return []
        if self.share_budget is not None:
            budgets = self.share_budget(inputs_L, setting)
            return [self.plan(x, replace_budget(setting, room)) for x, room in zip(inputs_L, budgets, strict=True)]
        rows = self.plan_many(batch_of(inputs_L), setting)
        return [rows.plan(row, x.layer) for row, x in enumerate(inputs_L)]


def replace_budget(setting: Setting, budget: Budget) -> Setting:
    """The same setting with another budget."""
    return Setting(setting.spec, setting.cluster, setting.costs, budget, setting.params)


class PlannerInUse:
    """Mixin of frozen dataclasses that hold a planner with its parameters, model, cluster, costs and budget."""

    planner: Planner
    params: Any
    spec: MoESpec
    cluster: Cluster
    costs: CostModel
    budget: Budget

    @cached_property
    def setting(self) -> Setting:
        """What the planner is given each time."""
        return Setting(self.spec, self.cluster, self.costs, self.budget, self.params)

    def plan(
        self,
        layer: int,
        phase: Phase,
        forecast: Forecast,
        previous: LayerPlan | None = None,
        state_R: Any = None,
        horizon: int = 0,
        lead: float = 0.0,
        copy: float | None = None,
    ) -> LayerPlan:
        """Ask the planner for one layer."""
        x = PlanInput(layer, phase, forecast, previous, state_R, horizon, lead, copy)
        return self.planner.plan(x, self.setting)

    def plan_all(
        self,
        phase: Phase,
        forecast_L: Sequence[Forecast],
        previous_L: Sequence[LayerPlan] | None = None,
        horizon: int = 0,
    ) -> list[LayerPlan]:
        """Ask the planner for all layers at one time."""
        inputs = [
            PlanInput(layer, phase, forecast, previous_L[layer] if previous_L else None, None, horizon)
            for layer, forecast in enumerate(forecast_L)
        ]
        return self.planner.plan_all(inputs, self.setting)

    def dispatch(self, load_SE: IntArray, plan: LayerPlan, usable_R: BoolArray) -> IntArray:
        """Ask the planner's dispatch for quotas, ``[S, R]``."""
        return self.planner.dispatch(load_SE, plan, usable_R, self.setting)
