"""A policy's parts on a live model: planner, predictor, budget, costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeless.cluster import Cluster
from moeless.contracts import AUTO, Budget, FloatArray, Forecast, InstanceState, LayerPlan, Phase, Policy
from moeless.costs import COSTS, CostModel
from moeless.errors import UserError
from moeless.placement import PLANNERS, Planner
from moeless.placement.base import PlannerInUse
from moeless.placement.keep_kernels import hardly_changed
from moeless.spec import MoESpec

#: The routing override, which is no planner.
ORACLE = "oracle"
#: Iterations that a plan made once or at intervals is expected to stay.
LONG_HORIZON = 10_000
#: Tokens of an iteration that the first plans are meant for.
FIRST_TOKENS = 512


@dataclass(frozen=True)
class LivePolicy(PlannerInUse):
    """One policy, ready to decide.

    Attributes:
        predictor: None where the planner plans once or at intervals.
        lossy: the router's choice is overridden by even loads (the oracle).
    """

    label: str
    policy: Policy
    planner: Planner
    params: Any
    predictor: Any
    budget: Budget
    spec: MoESpec
    cluster: Cluster
    costs: CostModel
    lossy: bool

    def from_share(self, share_E: FloatArray | None, tokens: int) -> Forecast:
        """A forecast from load shares, even ones where none are known."""
        share = np.full(self.spec.E, 1.0 / self.spec.E) if share_E is None else share_E
        mean_E = share * (tokens * self.spec.K)
        return Forecast(mean_E, mean_E.copy(), tokens, "history")

    def warm_up(self) -> None:
        """Run planner and dispatch once on skewed loads, so that nothing compiles while tokens wait."""
        share_E = np.arange(1.0, self.spec.E + 1) ** 2
        plan = self.first_plan(0, None)
        for tokens in (1, 64, 1 << 20):
            forecast = self.from_share(share_E / share_E.sum(), tokens)
            plan = self.plan(0, Phase.MIXED, forecast, plan, np.full(plan.R, InstanceState.WARM, np.uint8))
            load_E = np.rint(forecast.mean_E).astype(np.int64)
            load_SE = np.tile(load_E // self.cluster.G, (self.cluster.G, 1))
            self.dispatch(load_SE, plan, np.ones(plan.R, np.bool_))
            hardly_changed(forecast.mean_E, np.zeros((1, self.spec.E))[0], 0.0)

    def first_plan(self, layer: int, share_E: FloatArray | None) -> LayerPlan:
        """The plan of the deployment."""
        return self.plan(layer, Phase.MIXED, self.from_share(share_E, FIRST_TOKENS), horizon=LONG_HORIZON)


def resolve_live(
    text: str,
    *,
    spec: MoESpec,
    cluster: Cluster,
    costs: str,
    extra_slots: int,
    model: Path,
    predictors: tuple[Path, ...] = (),
    params: Mapping[str, Any] | None = None,
) -> LivePolicy:
    """Find the parts of ``planner[:predictor[:distance]]``.

    A policy that names no predictor gets the planner's default; where that one has to be fitted and no folder holds
    it, the model's own gates, which a live model always has.

    Raises:
        UserError: a name is unknown, or the predictor cannot run live.
    """
    policy = Policy.parse(text)
    lossy = policy.planner == ORACLE
    if lossy and policy.predictor != "none":
        raise UserError(f"policy {text}: the oracle overrides routing and takes no predictor; write oracle")
    planner: Planner = PLANNERS.get("static" if lossy else policy.planner)
    name = policy.predictor
    if planner.needs_forecast and name == "none":
        name = _default_predictor(planner, predictors)
    if not planner.needs_forecast and name != "none":
        raise UserError(f"policy {text}: {policy.planner} needs no forecast; write {policy.planner}")
    predictor = None
    if planner.cadence == "interval" and name != "history":
        raise UserError(f"policy {text}: {planner.name} plans at intervals from history; write {planner.name}:history")
    if planner.needs_forecast and planner.cadence == "iteration":
        predictor = _predictor(name, spec, model, predictors)
        if policy.distance == AUTO and predictor.skill(0, 1, Phase.DECODE, 32) is None:
            raise UserError(
                f"policy {text}: distance auto goes by what fitting measured, and {name} was not fitted at distance 1; "
                "write a number, or name a predictor made by train-predictor"
            )
        if policy.distance >= spec.L:
            raise UserError(f"policy {text}: the distance must be below the model's {spec.L} MoE layers")
    try:
        chosen = planner.params(**(params or {}))
    except TypeError as error:
        raise UserError(f"planner {planner.name} does not take these parameters ({error})") from None
    budget = Budget.even(spec.E, cluster.G, 0 if planner.name == "static" else extra_slots, spec.expert_bytes)
    label = ORACLE if lossy else policy.planner
    if name != "none":
        label += f":{name}" + (f":{policy.distance or 'auto'}" if predictor is not None and name != "history" else "")
    return LivePolicy(
        label,
        Policy(policy.planner, name, policy.distance),
        planner,
        chosen,
        predictor,
        budget,
        spec,
        cluster,
        COSTS.get(costs)(spec, cluster),
        lossy,
    )


def _default_predictor(planner: Planner, folders: tuple[Path, ...]) -> str:
    from moeless.predictors import PREDICTORS, load_predictor

    name = planner.default_predictor
    unfitted = not PREDICTORS.get(name).needs_fitting
    return name if unfitted or any(load_predictor(folder).name == name for folder in folders) else "gate_reuse"


def _predictor(name: str, spec: MoESpec, model: Path, folders: tuple[Path, ...]) -> Any:
    from moeless.predictors import PREDICTORS, load_predictor

    kind = PREDICTORS.get(name)
    if kind.reads == "true_load":
        raise UserError("the oracle predictor reads the future and exists in the simulator only")
    for folder in folders:
        predictor = load_predictor(folder)
        if predictor.name != name:
            continue
        mine, its = ((s.L, s.E, s.K, s.hidden_size) for s in (spec, predictor.spec))
        if mine != its:
            raise UserError(f"{folder} was fitted for {predictor.spec.name}, whose shapes are not those of {spec.name}")
        return predictor
    if kind.needs_gates and not kind.needs_fitting:
        from moeless.predictors.gates import read_gates

        return kind(spec, gates=read_gates(model, spec))
    try:
        return kind(spec)
    except TypeError:
        raise UserError(f"predictor {name!r} has to be fitted first: give its folder with --predictor") from None
