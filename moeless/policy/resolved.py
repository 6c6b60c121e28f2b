"""A policy ready to decide: its planner with parameters, its predictor, what it may hold.

Simulator and live engine are given the same object. The simulator adds a clock, the engine collectives and threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeless.cluster import Cluster
from moeless.contracts import AUTO, Budget, FloatArray, Forecast, InstanceState, LayerPlan, Phase, Policy
from moeless.costs import CostModel
from moeless.errors import UserError
from moeless.placement import PLANNERS, Planner
from moeless.placement.base import PlannerInUse
from moeless.policy.predictors import PredictorSource, ReadyPredictors
from moeless.policy.reuse import PlanReuse
from moeless.predictors.distance import LONGEST, DistanceRule
from moeless.spec import MoESpec

#: The routing override, which is no planner.
ORACLE = "oracle"
#: Tokens of an iteration that a plan made before the run is meant for, for every 64 GPUs where there are more.
DEPLOYMENT_TOKENS = 512
#: Iterations that a plan made once or at intervals is expected to stay, for planners that weigh moving against gain.
INTERVAL_ITERATIONS = 10_000


@dataclass(frozen=True)
class ResolvedPolicy(PlannerInUse):
    """One policy on one (model, cluster, cost model).

    Attributes:
        policy: names; for ``oracle`` the planner is ``static`` under a routing override.
        predictor: a load predictor, None where the planner plans once or at intervals.
        lossy: loads are overridden to be even.
        even_layers: every layer has the same room, whatever the planner would give it (a live engine's slots).
    """

    policy: Policy
    planner: Planner
    params: Any
    predictor: Any
    spec: MoESpec
    cluster: Cluster
    costs: CostModel
    budget: Budget
    lossy: bool = False
    even_layers: bool = False

    @property
    def label(self) -> str:
        """The name that people see: the distance only where a predictor looks ahead by layers."""
        if self.lossy:
            return ORACLE
        if self.predictor is None or self.predictor.from_history:
            name = self.policy.predictor
            return self.policy.planner if name == "none" else f"{self.policy.planner}:{name}"
        return str(self.policy)

    def from_share(self, share_E: FloatArray | None, tokens: int) -> Forecast:
        """A forecast for so many tokens from load shares, even ones where none are known."""
        share = np.full(self.spec.E, 1.0 / self.spec.E) if share_E is None else share_E
        mean_E = share * (tokens * self.spec.K)
        return Forecast(mean_E, mean_E.copy(), tokens, "history")

    def first_plans(self, share_L: Sequence[FloatArray | None] | None = None) -> list[LayerPlan]:
        """The plans of the deployment, from the load shares known beforehand (even ones where none are)."""
        # so few tokens that many GPUs have one or two each would leave elastic nothing to gain by copies
        tokens = DEPLOYMENT_TOKENS * max(1, self.cluster.G // 64)
        forecasts = [self.from_share(share_E, tokens) for share_E in share_L or [None] * self.spec.L]
        return self.plan_all(Phase.MIXED, forecasts, horizon=INTERVAL_ITERATIONS)

    def plan_all(
        self,
        phase: Phase,
        forecast_L: Sequence[Forecast],
        previous_L: Sequence[LayerPlan] | None = None,
        horizon: int = 0,
    ) -> list[LayerPlan]:
        """Ask the planner for all layers at one time."""
        planner = replace(self.planner, share_budget=None) if self.even_layers else self.planner
        return PlannerInUse.plan_all(replace(self, planner=planner), phase, forecast_L, previous_L, horizon)

    def distance_rule(self, copy_seconds: float) -> DistanceRule | None:
        """The rule of distance ``auto``; None where the policy states its distance.

        Args:
            copy_seconds: what bringing a copy takes from the slowest place that it may come from.
        """
        if self.policy.distance != AUTO or self.predictor is None:
            return None
        prepare = self.costs.background_seconds(self.planner.control) + copy_seconds
        return DistanceRule(self.predictor, prepare, LONGEST)

    def warm_up(self) -> None:
        """Run planner and dispatch once on skewed loads, so that nothing compiles while tokens wait."""
        share_E = np.arange(1.0, self.spec.E + 1) ** 2
        plan = self.first_plans()[0]
        for tokens in (1, 64, 1 << 20):
            forecast = self.from_share(share_E / share_E.sum(), tokens)
            plan = self.plan(0, Phase.MIXED, forecast, plan, np.full(plan.R, InstanceState.WARM, np.uint8))
            load_E = np.rint(forecast.mean_E).astype(np.int64)
            load_SE = np.tile(load_E // self.cluster.G, (self.cluster.G, 1))
            self.dispatch(load_SE, plan, np.ones(plan.R, np.bool_))
            PlanReuse(self, self.predictor).keeps(0, forecast)


def resolve(
    policy: Policy,
    *,
    spec: MoESpec,
    cluster: Cluster,
    costs: CostModel,
    extra_slots: int,
    predictors: PredictorSource | Mapping[str, Any],
    params: Mapping[str, Any] | None = None,
    even_layers: bool = False,
) -> ResolvedPolicy:
    """Find a policy's parts by name.

    Args:
        extra_slots: replicas per GPU and layer beyond the static primaries, for planners that hold any.
        predictors: where predictors come from, or ready ones by name.
        params: planner parameters that replace defaults.
        even_layers: as in :class:`ResolvedPolicy`.

    Raises:
        UserError: no planner or predictor has that name, or a parameter is unknown.
    """
    source = ReadyPredictors(predictors) if isinstance(predictors, Mapping) else predictors
    lossy = policy.planner == ORACLE
    if lossy and policy.predictor != "none":
        raise UserError(f"policy {policy}: the oracle overrides routing and takes no predictor; write oracle")
    planner: Planner = PLANNERS.get("static" if lossy else policy.planner)
    name = policy.predictor
    if planner.needs_forecast and name == "none":
        name = source.default(planner)
    if not planner.needs_forecast and name != "none":
        raise UserError(f"policy {policy}: {policy.planner} needs no forecast; write {policy.planner}")
    if planner.cadence == "interval" and name != "history":
        raise UserError(
            f"policy {policy}: {policy.planner} plans at intervals from history; write {planner.name}:history"
        )
    predictor = None
    if planner.needs_forecast and planner.cadence == "iteration":
        predictor = source.get(name, policy)
        if policy.distance == AUTO and predictor.skill(0, 1, Phase.DECODE, 32) is None:
            raise UserError(
                f"policy {policy}: distance auto goes by what fitting measured, and {name} was not fitted at distance "
                "1; write a number, or name a predictor made by train-predictor"
            )
    try:
        chosen = planner.params(**(params or {}))
    except TypeError as error:
        raise UserError(f"planner {planner.name} does not take these parameters ({error})") from None
    budget = Budget.even(spec.E, cluster.G, extra_slots if planner.holds_extras else 0, spec.expert_bytes)
    return ResolvedPolicy(
        replace(policy, predictor=name), planner, chosen, predictor, spec, cluster, costs, budget, lossy, even_layers
    )
