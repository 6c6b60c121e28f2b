"""A policy ready to run: its planner with parameters, its predictor, what it may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moeless.cluster import Cluster
from moeless.contracts import AUTO, Budget, FloatArray, Forecast, LayerPlan, Phase, Policy
from moeless.costs import CostModel
from moeless.errors import UserError
from moeless.placement import PLANNERS, Planner
from moeless.placement.base import PlannerInUse
from moeless.spec import MoESpec

#: The routing override, which is no planner.
ORACLE = "oracle"
#: Tokens of an iteration that a plan made before the run is meant for, for every 64 GPUs where there are more.
DEPLOYMENT_TOKENS = 512
#: Iterations that an ``interval`` plan is expected to stay, for planners that weigh moving against gain.
INTERVAL_ITERATIONS = 10_000


@dataclass(frozen=True)
class PolicyRuntime(PlannerInUse):
    """One policy on one (model, cluster, cost model).

    Attributes:
        policy: names; for ``oracle`` the planner is ``static`` under a routing override.
        predictor: a load predictor, None where the planner needs no forecast.
        lossy: loads are overridden to be even.
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
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name that people see: the distance only where a predictor looks ahead by layers."""
        if self.lossy:
            return ORACLE
        if self.policy.predictor == "none":
            return self.policy.planner
        if self.policy.predictor == "history":
            return f"{self.policy.planner}:{self.policy.predictor}"
        return str(self.policy)

    def deployment(self, share_L: Sequence[FloatArray | None]) -> list[LayerPlan]:
        """The plans with which the run starts, from the shares known beforehand (even ones where none are)."""
        even_E = np.full(self.spec.E, 1.0 / self.spec.E)
        # so few tokens that many GPUs have one or two each would leave elastic nothing to gain by copies
        tokens = DEPLOYMENT_TOKENS * max(1, self.cluster.G // 64)
        mean_LE = [(even_E if share is None else share) * tokens * self.spec.K for share in share_L]
        forecasts = [Forecast(mean_E, mean_E.copy(), tokens, "history") for mean_E in mean_LE]
        return self.plan_all(Phase.MIXED, forecasts, horizon=INTERVAL_ITERATIONS)


def resolve(
    policy: Policy,
    *,
    spec: MoESpec,
    cluster: Cluster,
    costs: CostModel,
    extra_slots: int,
    predictors: Mapping[str, Any],
    params: Mapping[str, Any] | None = None,
) -> PolicyRuntime:
    """Find a policy's parts by name.

    Args:
        extra_slots: replicas per GPU and layer beyond the static primaries.
        predictors: ready predictors by name; the caller loads the fitted ones.
        params: planner parameters that replace defaults.

    Raises:
        UserError: no planner or predictor has that name, or a parameter is unknown.
    """
    budget = Budget.even(spec.E, cluster.G, extra_slots, spec.expert_bytes)
    lossy = policy.planner == ORACLE
    if lossy and policy.predictor != "none":
        raise UserError(f"policy {policy}: the oracle overrides routing and takes no predictor; write oracle")
    if lossy:
        planner: Planner = PLANNERS.get("static")
        budget = Budget.even(spec.E, cluster.G, 0, spec.expert_bytes)
    else:
        planner = PLANNERS.get(policy.planner)
    name = policy.predictor
    if planner.needs_forecast and name == "none":
        name = planner.default_predictor
    if not planner.needs_forecast and name != "none":
        raise UserError(f"policy {policy}: {policy.planner} needs no forecast; write {policy.planner}")
    predictor = None
    if planner.cadence == "interval" and name != "history":
        raise UserError(
            f"policy {policy}: {policy.planner} plans at intervals from history; write {planner.name}:history"
        )
    if planner.needs_forecast and planner.cadence == "iteration":
        if name not in predictors:
            known = ", ".join(sorted(predictors))
            raise UserError(f"policy {policy}: no predictor {name!r} is at hand; there are: {known}")
        predictor = predictors[name]
        if policy.distance == AUTO and predictor.skill(0, 1, Phase.DECODE, 32) is None:
            raise UserError(
                f"policy {policy}: distance auto goes by what fitting measured, and {name} was not fitted at distance "
                "1; write a number, or name a predictor made by train-predictor"
            )
    try:
        chosen = planner.params(**(params or {}))
    except TypeError as error:
        raise UserError(f"planner {planner.name} does not take these parameters ({error})") from None
    return PolicyRuntime(
        replace(policy, predictor=name), planner, chosen, predictor, spec, cluster, costs, budget, lossy
    )
