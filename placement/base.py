"""What a planner is: a function that plans, a rule that deals tokens to copies, and what both declare of themselves.

Whoever needs to know something of a planner (a cost model that charges for its decisions, the simulator, the live
engine) asks its declarations, never its name: a copy under another name behaves just the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from moeless.cluster import Cluster
from moeless.contracts import BoolArray, Budget, Forecast, IntArray, LayerPlan, Phase, PlanInput
from moeless.costs import Control, CostModel
from moeless.spec import MoESpec

#: When a planner plans: once, every ``replan_seconds``, or before each iteration.
Cadence = Literal["once", "interval", "iteration"]


class PlanLayer(Protocol):
    """Replicas and placement of one layer, ahead of time."""

    def __call__(
        self, x: PlanInput, *, spec: MoESpec, cluster: Cluster, costs: CostModel, budget: Budget, params: Any
    ) -> LayerPlan: ...


class Dispatch(Protocol):
    """Tokens of each source rank to each replica, after the gate; rows sum, per expert, to ``load_SE``."""

    def __call__(
        self,
        load_SE: IntArray,
        plan: LayerPlan,
        usable_R: BoolArray,
        *,
        spec: MoESpec,
        cluster: Cluster,
        costs: CostModel,
        params: Any,
    ) -> IntArray: ...


class ShareBudget(Protocol):
    """Room of each layer, out of what all layers have together; ``budget`` is an even layer's."""

    def __call__(
        self,
        inputs_L: Sequence[PlanInput],
        *,
        spec: MoESpec,
        cluster: Cluster,
        costs: CostModel,
        budget: Budget,
        params: Any,
    ) -> list[Budget]: ...


class PlanLayers(Protocol):
    """The plans of all layers at once, the same as of one after the other."""

    def __call__(
        self,
        inputs_L: Sequence[PlanInput],
        *,
        spec: MoESpec,
        cluster: Cluster,
        costs: CostModel,
        budget: Budget,
        params: Any,
    ) -> list[LayerPlan]: ...


@dataclass(frozen=True)
class DispatchRule:
    """How a layer's tokens are dealt to its copies once the gate has chosen experts.

    Attributes:
        quotas: the rule as a function, see :class:`Dispatch`.
        gathers_counts: True if the ranks must gather their token counts before any of them can send, so that cost
            models charge the gathering and the decision to every layer that has a choice. False for rules that each
            rank can follow by itself.
        timed_as: the entry of a hardware profile's ``control.dispatch_seconds`` that holds this rule's measured time;
            empty if none does.
    """

    quotas: Dispatch
    gathers_counts: bool
    timed_as: str = ""

    def __call__(
        self,
        load_SE: IntArray,
        plan: LayerPlan,
        usable_R: BoolArray,
        *,
        spec: MoESpec,
        cluster: Cluster,
        costs: CostModel,
        params: Any = None,
    ) -> IntArray:
        """Quotas, ``[S, R]`` tokens."""
        return self.quotas(load_SE, plan, usable_R, spec=spec, cluster=cluster, costs=costs, params=params)

    @property
    def control(self) -> Control:
        """What cost models charge for it."""
        return Control(gathers_counts=self.gathers_counts, dispatch_timed_as=self.timed_as)


@dataclass(frozen=True)
class Planner:
    """A planner by name.

    Attributes:
        dispatch: the rule that serves its plans. A plain function counts as a rule that gathers counts.
        params: frozen dataclass of the planner's parameters; its defaults are the planner's defaults.
        cadence: when to plan.
        needs_forecast: False where the plan does not depend on a forecast.
        default_predictor: what ``--policy NAME`` alone uses.
        source: paper or repository that the method comes from.
        share_budget: for planners that give some layers more room than others; None where each has the same.
        plan_layers: for planners that plan all layers faster together; None where one by one is as fast.
        holds_extras: False for planners that never have a copy beyond the primaries, whatever the budget.
        timed_as: the entry of a hardware profile's ``control.plan_seconds`` that holds the measured time of planning
            a layer; empty if none does.
    """

    name: str
    plan_layer: PlanLayer
    dispatch: DispatchRule
    params: type[Any]
    cadence: Cadence
    needs_forecast: bool
    default_predictor: str
    source: str
    share_budget: ShareBudget | None = None
    plan_layers: PlanLayers | None = None
    holds_extras: bool = True
    timed_as: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.dispatch, DispatchRule):
            object.__setattr__(self, "dispatch", DispatchRule(self.dispatch, gathers_counts=True))

    @property
    def control(self) -> Control:
        """What cost models charge for its decisions while requests are served."""
        return replace(self.dispatch.control, plans_ahead=self.cadence == "iteration", planning_timed_as=self.timed_as)


def plan_all_layers(
    planner: Planner,
    inputs_L: Sequence[PlanInput],
    *,
    spec: MoESpec,
    cluster: Cluster,
    costs: CostModel,
    budget: Budget,
    params: Any,
) -> list[LayerPlan]:
    """Plan all layers of a model at one time, each within ``budget`` or what the planner makes of it for all.

    Raises:
        UserError: the planner refuses the budget.
    """
    if planner.plan_layers is not None and len(inputs_L) > 0:
        return planner.plan_layers(inputs_L, spec=spec, cluster=cluster, costs=costs, budget=budget, params=params)
    budgets = [budget] * len(inputs_L)
    if planner.share_budget is not None:
        budgets = planner.share_budget(inputs_L, spec=spec, cluster=cluster, costs=costs, budget=budget, params=params)
    return [
        planner.plan_layer(x, spec=spec, cluster=cluster, costs=costs, budget=room, params=params)
        for x, room in zip(inputs_L, budgets, strict=True)
    ]


class PlannerInUse:
    """Mixin of dataclasses that hold a planner with its parameters, model, cluster, costs and budget."""

    planner: Planner
    params: Any
    spec: MoESpec
    cluster: Cluster
    costs: CostModel
    budget: Budget

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
        return self.planner.plan_layer(
            PlanInput(layer, phase, forecast, previous, state_R, horizon, lead, copy),
            spec=self.spec,
            cluster=self.cluster,
            costs=self.costs,
            budget=self.budget,
            params=self.params,
        )

    def plan_all(
        self,
        phase: Phase,
        forecast_L: Sequence[Forecast],
        previous_L: Sequence[LayerPlan] | None = None,
        horizon: int = 0,
    ) -> list[LayerPlan]:
        """Ask the planner for all layers at one time."""
        return plan_all_layers(
            self.planner,
            [
                PlanInput(layer, phase, forecast, previous_L[layer] if previous_L else None, None, horizon)
                for layer, forecast in enumerate(forecast_L)
            ],
            spec=self.spec,
            cluster=self.cluster,
            costs=self.costs,
            budget=self.budget,
            params=self.params,
        )

    def dispatch(self, load_SE: IntArray, plan: LayerPlan, usable_R: BoolArray) -> IntArray:
        """Ask the planner's dispatch for quotas, ``[S, R]``."""
        return self.planner.dispatch(
            load_SE, plan, usable_R, spec=self.spec, cluster=self.cluster, costs=self.costs, params=self.params
        )
