"""Elastic planner: extras ahead from a forecast, their use from the true counts, never slower than static EP.

Two stages. *Placement* leaves every primary on its static GPU, tries several rules for extra copies, judges each on
scenarios drawn from the forecast's mean and spread, and keeps the fewest extras that save what the best saves.
*Dispatch* sees the true counts after the gate and decides which copies work, with which shares; using primaries
alone is always among its choices, so it cannot lose to static EP under the cost model it was given.

Axes: E experts, R replicas, G GPUs, S source ranks, C scenarios.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moeless.cluster import Cluster
from moeless.contracts import (
    BoolArray,
    Budget,
    FloatArray,
    Forecast,
    InstanceState,
    Int32Array,
    IntArray,
    LayerPlan,
    PlanInput,
    Policy,
)
from moeless.costs import CostModel
from moeless.errors import UserError
from moeless.placement import dispatch_kernels as kernels
from moeless.placement.base import Planner
from moeless.placement.choose_kernels import choose_extras, static_and_bound
from moeless.placement.dispatch import serving_R
from moeless.placement.grow_kernels import BY_GPU, grow
from moeless.placement.layout import static_layout
from moeless.spec import MoESpec


@dataclass(frozen=True)
class ElasticParams:
    """Parameters of both stages.

    Attributes:
        scenarios: loads drawn from the forecast to judge placements on; 0 takes the first rule's plan unjudged.
        economy: relative layer time that fewer extras may cost; extras that save less are left out.
        patience_iterations: iterations a plan is taken to stay where the caller expects fewer, in weighing the
            time a change saves against the time its copies need to arrive.
        skip: leave a layer to static EP where dispatch is not expected to pay for its own control time.
        depth: GPUs that a chain of moved load may pass on.
        keep: change of a forecast, relative to its tokens, below which a caller may keep the plan unasked (see
            ``keep_kernels``); 0 asks always.
        fuel: pairs of copies that the dispatch examines at most, and a quarter as many in its last, deeper search.
        seed: of the scenarios.
    """

    scenarios: int = 8
    economy: float = 1e-3
    patience_iterations: int = 256
    skip: bool = True
    depth: int = 4
    fuel: int = 400
    keep: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("scenarios", "economy", "patience_iterations", "depth", "fuel", "keep", "seed"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must be a number of at least 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Rates:
    """``max(a n, b) + c n``: seconds per token, weight read, exchange per token."""

    a: float
    b: float
    c: float


@lru_cache(maxsize=64)
def rates_of(costs: CostModel) -> Rates:
    """The cost model's numbers as the search takes them."""
    terms = costs.terms()
    # where a layer ends with its slowest replica, levelling GPUs by tokens is what is left to do
    return Rates(max(terms.token_seconds, 1e-15), terms.floor_seconds, 2 * terms.link_seconds)


@lru_cache(maxsize=64)
def _normal_CE(seed: int, scenarios: int, num_experts: int) -> FloatArray:
    half = np.random.default_rng(seed).standard_normal((-(-scenarios // 2), num_experts))
    # mirrored pairs keep the scenarios' mean at the forecast's
    return np.concatenate([half, -half])[:scenarios]


def scenarios_CE(forecast: Forecast, scenarios: int, seed: int) -> IntArray:
    """Loads that the forecast deems likely, ``[C, E]``; the same for the same arguments."""
    spread_E = np.sqrt(np.maximum(forecast.var_E, forecast.mean_E))
    drawn = forecast.mean_E + spread_E * _normal_CE(seed, scenarios, len(forecast.mean_E))
    return np.asarray(np.rint(np.maximum(drawn, 0.0)), np.int64)


Copies = tuple[Int32Array, Int32Array]

_POLICY = Policy("elastic")


def _previous_copies(x: PlanInput, gpu_E: IntArray, room: IntArray, max_extra: int) -> Copies | None:
    """The previous plan's copies, primaries first, where they are a plan of this planner and still fit."""
    plan = x.previous
    if plan is None or plan.num_extra > max_extra or int(plan.primary_R.sum()) != len(gpu_E):
        return None
    if (plan.gpu_R[plan.primary_R] != gpu_E[plan.expert_R[plan.primary_R]]).any():
        return None
    if (plan.slots_G(len(room)) > room).any():
        return None
    order = np.argsort(plan.expert_R[plan.primary_R], kind="stable")
    first, extra = np.flatnonzero(plan.primary_R)[order], np.flatnonzero(~plan.primary_R)
    at = np.concatenate([first, extra])
    return plan.expert_R[at], plan.gpu_R[at]


def _arrival_seconds(copies: Copies, x: PlanInput, spec: MoESpec, costs: CostModel) -> float:
    """When the last copy that is not in memory would have come, from host memory, GPUs loading at once."""
    if x.previous is None:
        return 0.0
    live = np.ones(x.previous.R, np.bool_)
    if x.state_R is not None:
        live = (x.state_R == InstanceState.WARM) | (x.state_R == InstanceState.LOADING)
    absent_EG = np.ones((spec.E, costs.cluster.num_gpus), np.bool_)
    absent_EG[x.previous.expert_R[live], x.previous.gpu_R[live]] = False
    expert_X, gpu_X = copies[0][spec.E :], copies[1][spec.E :]
    waiting: dict[int, float] = {}
    for gpu in gpu_X[absent_EG[expert_X, gpu_X]].tolist():
        waiting[gpu] = waiting.get(gpu, 0.0) + costs.load_seconds(spec.expert_bytes, "host", gpu)
    return max(waiting.values(), default=0.0)


def plan_layer(
    x: PlanInput, *, spec: MoESpec, cluster: Cluster, costs: CostModel, budget: Budget, params: ElasticParams
) -> LayerPlan:
    """Static primaries, and the fewest extras that close the gap for loads like the forecast's.

    No extra at all where dispatch is not expected to save its own control time (the skip decision), and the previous
    extras where a change would not pay for its transfers.

    Raises:
        UserError: a GPU has no room for its static experts.
    """
    gpus, experts = cluster.num_gpus, spec.E
    gpu_E, room, extra = static_layout(budget, spec, gpus)
    rates = rates_of(costs)
    static: Copies = (np.arange(experts, dtype=np.int32), gpu_E.astype(np.int32))
    chosen = static
    if extra and gpus > 1 and x.forecast.mean_E.any():
        chosen = _choose(x, static, gpu_E, room, extra, rates, spec, cluster, costs, params)
    primary_R = np.arange(len(chosen[0])) < experts
    return LayerPlan.build(x.layer, *chosen, primary_R, num_experts=experts, num_gpus=gpus)


def _choose(
    x: PlanInput,
    static: Copies,
    gpu_E: IntArray,
    room: IntArray,
    extra: int,
    rates: Rates,
    spec: MoESpec,
    cluster: Cluster,
    costs: CostModel,
    params: ElasticParams,
) -> Copies:
    mean_E, gpus = x.forecast.mean_E, cluster.num_gpus
    expert_R, gpu_R = np.empty(spec.E + extra, np.int32), np.empty(spec.E + extra, np.int32)
    if params.scenarios == 0:
        count = grow(mean_E, gpu_E, room, extra, BY_GPU, expert_R, gpu_R)
        return expert_R[:count], gpu_R[:count]
    load_CE = scenarios_CE(x.forecast, params.scenarios, params.seed)
    control = costs.control_seconds(_POLICY, x.layer) if params.skip else -1.0
    numbers = rates.a, rates.b, rates.c
    bound_C = np.empty(len(load_CE))
    plain = static_and_bound(load_CE, gpu_E, gpus, extra, *numbers, bound_C)
    if params.skip and plain - float(bound_C.sum()) <= control:
        # not even the best plan there could be would pay
        return static
    # an expert without tokens costs nothing, any other at least its weight read
    likely_E = np.maximum(rates.a * mean_E, rates.b * -np.expm1(-mean_E)) + rates.c * mean_E
    count, reached = choose_extras(
        load_CE, bound_C, np.stack((mean_E, likely_E)), gpu_E, room, extra, *numbers, params.depth, params.fuel,
        plain, params.economy, expert_R, gpu_R,
    )  # fmt: skip
    copies = expert_R[:count], gpu_R[:count]
    horizon = max(x.horizon_iterations, params.patience_iterations)
    previous = _previous_copies(x, gpu_E, room, extra)
    if previous is not None:
        kept = float(kernels.expected_seconds(load_CE, *previous, gpus, *numbers, params.depth, params.fuel)[1])
        if (kept - reached) * horizon <= _arrival_seconds(copies, x, spec, costs) - _arrival_seconds(
            previous, x, spec, costs
        ):
            copies, reached = previous, kept
    if params.skip and plain - reached <= control:
        return static
    return copies


def dispatch(
    load_SE: IntArray,
    plan: LayerPlan,
    usable_R: BoolArray,
    *,
    spec: MoESpec,
    cluster: Cluster,
    costs: CostModel,
    params: ElasticParams,
) -> IntArray:
    """Tokens of each source rank to each copy from the true counts, ``[S, R]``.

    The primaries alone are among the choices compared, under the cost model's own layer time.

    Raises:
        UserError: ``usable_R`` does not match the plan.
    """
    load_SE = np.ascontiguousarray(load_SE, np.int64)
    usable = np.asarray(usable_R, np.bool_)
    if usable.shape != plan.expert_R.shape:
        raise UserError(f"usable marks must be one per replica: {plan.R} replicas, got shape {usable.shape}")
    quota_SR = np.empty((load_SE.shape[0], plan.R), np.int64)
    numbers_K = dispatch_numbers(costs)
    if numbers_K is None:
        return _dispatch_checked(load_SE, plan, usable, quota_SR, costs, params)
    gpus = cluster.num_gpus
    kernels.best_quotas(
        load_SE, plan.expert_R, plan.gpu_R, plan.primary_R, usable, gpus, numbers_K, params.depth, params.fuel,
        np.empty(gpus), quota_SR,
    )  # fmt: skip
    return quota_SR


@lru_cache(maxsize=64)
def dispatch_numbers(costs: CostModel) -> FloatArray | None:
    """What :func:`dispatch_kernels.best_quotas` takes as ``numbers_K``; None for a cost model that is not numbers."""
    compiled = costs.kernel_terms()
    if compiled is None:
        return None
    rates = rates_of(costs)
    return np.array([rates.a, rates.b, rates.c, *map(float, compiled)])


def _dispatch_checked(
    load_SE: IntArray,
    plan: LayerPlan,
    usable: BoolArray,
    quota_SR: IntArray,
    costs: CostModel,
    params: ElasticParams,
) -> IntArray:
    """The same choice under a cost model that only :meth:`CostModel.layer_seconds` knows."""
    serving = serving_R(plan, usable, load_SE.shape[1])
    static_SR = np.empty_like(quota_SR)
    kernels.static_quotas(load_SE, plan.expert_R, plan.primary_R, serving, static_SR)
    rates = rates_of(costs)
    if plan.num_extra == 0 or not kernels.dispatch_layer(
        load_SE, plan.expert_R, plan.gpu_R, plan.primary_R, serving, costs.cluster.num_gpus, rates.a, rates.b, rates.c,
        params.depth, params.fuel, quota_SR,
    ):  # fmt: skip
        return static_SR
    least = costs.layer_seconds(static_SR, plan).total
    return quota_SR if costs.layer_seconds(quota_SR, plan).total < least else static_SR


PLANNER = Planner(
    name="elastic",
    plan_layer=plan_layer,
    dispatch=dispatch,
    params=ElasticParams,
    cadence="iteration",
    needs_forecast=True,
    default_predictor="history",
    source="this project: static primaries, extras by scenarios of the forecast, dispatch by chains of copies",
)
