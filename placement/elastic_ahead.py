"""Elastic with layers whose shares are fixed ahead: what its guarantee costs, and what giving it up gains.

Dispatch after the gate costs control time: counts are gathered and copies chosen in every layer. Ahead of time, per
layer and phase, this planner chooses on the forecast's scenarios among

(a) static EP, without extras and without control;
(b) ``elastic``'s extras with dispatch after the gate, its control time charged: never slower than static EP but by
    that time, whatever the forecast;
(c) extras whose shares are fixed ahead from the forecast, with nothing to gather and to decide. **Layers of this kind
    cannot carry elastic's guarantee**: where the forecast is wrong they may be slower than static EP. They are taken
    only where they are expected to beat both others by a margin that grows with the forecast's spread.

Primaries never leave their static GPUs here either. Where control costs nothing this is ``elastic``.

Axes: E experts, R replicas, G GPUs, S source ranks, C scenarios.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless.cluster import Cluster
from moeless.contracts import BoolArray, Budget, FloatArray, IntArray, LayerPlan, Phase, PlanInput
from moeless.costs import CostModel
from moeless.errors import UserError
from moeless.placement import elastic
from moeless.placement.base import DispatchRule, Planner
from moeless.placement.choose_kernels import ChoiceTerms
from moeless.placement.dispatch import serving_R
from moeless.placement.elastic import ElasticParams
from moeless.placement.fixed_kernels import split_by_shares, weigh_fixed
from moeless.placement.plan_scoring import draw_scenarios
from moeless.placement.threads import in_parallel
from moeless.placement.whole_model import spread_over_sources
from moeless.spec import MoESpec


@dataclass(frozen=True)
class ElasticAheadParams(ElasticParams):
    """Elastic's parameters, and those of shares fixed ahead.

    Attributes:
        share_scenarios: loads drawn to fix shares on, and as many others to compare the three kinds; 0: ``elastic``.
        spread, decode_spread: relative spread that these loads have at least, unless the forecast states none.
        caution: standard deviations, over scenarios, of what fixed shares save that are left out of their gain.
        margin: part of static EP's time that is left out of it besides: no number of scenarios shows all that is rare.
    """

    share_scenarios: int = 32
    spread: float = 0.25
    decode_spread: float = 0.1
    caution: float = 0.2
    margin: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("share_scenarios", "spread", "decode_spread", "caution", "margin"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must be a number of at least 0, got {getattr(self, name)}")

    def spread_of(self, phase: Phase) -> float:
        """The least relative spread of the loads that shares are fixed on."""
        return float(self.decode_spread if phase == Phase.DECODE else self.spread)


_NO_SHARES = np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.bool_), np.empty(0)


def _previous(x: PlanInput) -> tuple[Any, ...]:
    """The previous plan's copies that matter, whether they are in memory, and their shares (none: not fixed)."""
    plan = x.previous
    if plan is None:
        return _NO_SHARES
    live = elastic._previous(x)[3]
    if plan.share_R is None:
        return plan.expert_R, plan.gpu_R, live, _NO_SHARES[3]
    # copies that linger in memory beside the plan have no share
    used = plan.primary_R | (plan.share_R > 0)
    order = np.lexsort((plan.expert_R[used], ~plan.primary_R[used]))
    return tuple(np.ascontiguousarray(row[used][order]) for row in (plan.expert_R, plan.gpu_R, live, plan.share_R))


def fixed_terms(costs: CostModel, params: ElasticAheadParams) -> tuple[FloatArray, FloatArray, float, float]:
    """For compiled loops: scenarios, each layer's control time, caution and margin."""
    spec = costs.spec
    control_L = np.array([costs.control_seconds(DISPATCH.control, layer) for layer in range(spec.L)])
    normal_CE = elastic._normal_CE(params.seed, 2 * params.share_scenarios, spec.E)
    return np.ascontiguousarray(normal_CE), control_L, float(params.caution), float(params.margin)


def _fixed(
    x: PlanInput, base: LayerPlan, terms: ChoiceTerms, costs: CostModel, params: ElasticAheadParams
) -> LayerPlan:
    """A plan with fixed shares where that is expected to beat ``base`` and static EP, otherwise ``base``."""
    control = costs.control_seconds(DISPATCH.control, x.layer)
    if terms.extra == 0 or len(terms.room_G) == 1 or control <= 0 or params.share_scenarios == 0:
        return base
    experts, size = len(terms.gpu_E), len(terms.gpu_E) + terms.extra
    expert_R, gpu_R, share_R = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size)
    order = np.lexsort((base.expert_R, ~base.primary_R))
    expert_P, gpu_P, live_P, share_P = _previous(x)
    count = weigh_fixed(
        x.forecast.mean_E, x.forecast.var_E, params.spread_of(x.phase),
        elastic._normal_CE(params.seed, 2 * params.share_scenarios, experts), terms, base.expert_R[order],
        base.gpu_R[order], expert_P, gpu_P, live_P, share_P, x.horizon_iterations or params.patience_iterations,
        float(x.lead_seconds), elastic.copy_seconds_G(costs.spec, costs, x.copy_seconds), control, params.caution,
        params.margin, expert_R, gpu_R, share_R,
    )  # fmt: skip
    if count == 0:
        return base
    primary_R = np.arange(count) < experts
    order = np.lexsort((expert_R[:count], ~primary_R, gpu_R[:count]))
    made = LayerPlan(x.layer, expert_R[order], gpu_R[order], primary_R[order], share_R[order])
    return made if costs.kernel_terms() is not None or _saves(made, x, terms, costs, params) else base


def _saves(plan: LayerPlan, x: PlanInput, terms: ChoiceTerms, costs: CostModel, params: ElasticAheadParams) -> bool:
    """Whether a cost model that the search knows by straight lines alone sees the plan beat static EP itself."""
    normal_CE = elastic._normal_CE(params.seed, elastic._CHECKED, len(terms.gpu_E))
    load_CE = np.empty(normal_CE.shape, np.int64)
    count = draw_scenarios(x.forecast.mean_E, x.forecast.var_E, params.spread_of(x.phase), normal_CE, load_CE)
    usable, saved = np.ones(plan.R, np.bool_), 0.0
    for load_E in load_CE[:count]:
        load_SE = spread_over_sources(load_E, costs.cluster.num_gpus)
        quota_SR = np.empty((len(load_SE), plan.R), np.int64)
        split_by_shares(load_SE, plan.expert_R, plan.primary_R, plan.share_R, usable, quota_SR)
        saved += elastic.seconds_saved(load_SE, quota_SR, plan, costs)
    return saved > 0.0


def plan_layer(
    x: PlanInput, *, spec: MoESpec, cluster: Cluster, costs: CostModel, budget: Budget, params: ElasticAheadParams
) -> LayerPlan:
    """Of static EP, dispatch after the gate, and shares fixed ahead what is expected to be the fastest.

    Raises:
        UserError: a GPU has no room for its static experts.
    """
    base = elastic.plan_layer(x, spec=spec, cluster=cluster, costs=costs, budget=budget, params=params)
    return _fixed(x, base, elastic._choice_terms(spec, costs, budget, params), costs, params)


def plan_layers(
    inputs_L: Sequence[PlanInput],
    *,
    spec: MoESpec,
    cluster: Cluster,
    costs: CostModel,
    budget: Budget,
    params: ElasticAheadParams,
) -> list[LayerPlan]:
    """All layers at once, on as many threads as pay: the plans that :func:`plan_layer` makes one by one.

    Raises:
        UserError: a GPU has no room for its static experts.
    """
    plans = elastic.plan_layers(inputs_L, spec=spec, cluster=cluster, costs=costs, budget=budget, params=params)
    terms = elastic._choice_terms(spec, costs, budget, params)

    def some(start: int, stop: int) -> None:
        for i in range(start, stop):
            plans[i] = _fixed(inputs_L[i], plans[i], terms, costs, params)

    in_parallel(some, len(plans), len(plans) * spec.E * max(1, params.share_scenarios))
    return plans


def dispatch(
    load_SE: IntArray,
    plan: LayerPlan,
    usable_R: BoolArray,
    *,
    spec: MoESpec,
    cluster: Cluster,
    costs: CostModel,
    params: ElasticAheadParams,
) -> IntArray:
    """``elastic``'s dispatch, or the plan's fixed shares over the usable copies, ``[S, R]`` tokens.

    Under fixed shares each source rank's tokens are split without regard to any other's.

    Raises:
        UserError: ``usable_R`` does not match the plan.
    """
    if plan.share_R is None:
        return elastic.dispatch(load_SE, plan, usable_R, spec=spec, cluster=cluster, costs=costs, params=params)
    load_SE = np.ascontiguousarray(load_SE, np.int64)
    quota_SR = np.empty((load_SE.shape[0], plan.R), np.int64)
    serving = serving_R(plan, usable_R, load_SE.shape[1])
    split_by_shares(load_SE, plan.expert_R, plan.primary_R, plan.share_R, serving, quota_SR)
    return quota_SR


#: Layers whose shares are fixed ahead gather nothing; the others are dispatched, and charged, as ``elastic``'s.
DISPATCH = DispatchRule(dispatch, gathers_counts=True, timed_as=elastic.DISPATCH.timed_as)

PLANNER = Planner(
    name="elastic-ahead",
    plan_layer=plan_layer,
    dispatch=DISPATCH,
    plan_layers=plan_layers,
    params=ElasticAheadParams,
    cadence="iteration",
    needs_forecast=True,
    default_predictor="history",
    source="this project: elastic, and shares fixed ahead where dispatch does not pay for its control (no guarantee)",
    timed_as=elastic.PLANNER.timed_as,
)
