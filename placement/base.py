"""What a planner is: two pure functions and a parameter type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from moeless.cluster import Cluster
from moeless.contracts import BoolArray, Budget, IntArray, LayerPlan, PlanInput
from moeless.costs import CostModel
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


@dataclass(frozen=True)
class Planner:
    """A named pair of functions.

    Attributes:
        params: frozen dataclass of the planner's parameters; its defaults are the planner's defaults.
        cadence: when to plan.
        needs_forecast: False where the plan does not depend on a forecast.
        default_predictor: what ``--policy NAME`` alone uses.
        source: paper or repository that the method comes from.
    """

    name: str
    plan_layer: PlanLayer
    dispatch: Dispatch
    params: type[Any]
    cadence: Cadence
    needs_forecast: bool
    default_predictor: str
    source: str
