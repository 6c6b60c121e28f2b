"""Elastic planner: extras ahead from a forecast, their use from the true counts, never slower than static EP.

Two stages. *Placement* leaves every primary on its static GPU, tries several rules for extra copies, judges each on
scenarios drawn from the forecast's mean and spread, and keeps the fewest extras that save what the best saves.
*Dispatch* sees the true counts after the gate and decides which copies work, with which shares; using primaries
alone is always among its choices, so it cannot lose to static EP under the cost model it was given.

Axes: E experts, R replicas, G GPUs, S source ranks, C scenarios.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moeless.cluster import Cluster
from moeless.contracts import (
    BoolArray,
    Budget,
    FloatArray,
    InstanceState,
    Int32Array,
    IntArray,
    LayerPlan,
    Phase,
    PlanInput,
)
from moeless.costs import CostModel
from moeless.errors import UserError
from moeless.placement import dispatch_kernels as kernels
from moeless.placement.base import DispatchRule, Planner
from moeless.placement.choose_kernels import ChoiceTerms, choose, choose_layers, sort_plan
from moeless.placement.dispatch import serving_R
from moeless.placement.layout import static_layout
from moeless.placement.plan_scoring import draw_scenarios
from moeless.placement.threads import in_parallel
from moeless.placement.whole_model import spread_over_sources
from moeless.spec import MoESpec


@dataclass(frozen=True)
class ElasticParams:
    """Parameters of both stages.

    Attributes:
        scenarios: loads drawn from the forecast to judge placements on; 0 takes the first rule's plan unjudged.
        doubt, decode_doubt: relative spread that a forecast is taken to have at least, whatever it states, unless it
            states none; a decode step mixes many requests, so that it strays less from the past than a prefill.
        economy: relative layer time that fewer extras may cost; extras that save less are left out.
        patience_iterations: iterations a change is taken to pay for where the caller states none
            (``PlanInput.horizon_iterations`` 0), weighed against the time its copies need to arrive.
        skip: leave a layer to static EP where dispatch is not expected to pay for its own control time.
        skip_margin: part of the control time by which the expected saving has to exceed it, for what scenarios do not
            show.
        skip_caution: standard errors, over the scenarios, that are left out of what dispatch is expected to save.
        depth: GPUs that a chain of moved load may pass on.
        keep: change of a forecast, relative to its tokens, below which a caller may keep the plan unasked (see
            ``keep_kernels``); 0 asks always.
        fuel: pairs of copies that the dispatch examines at most; a quarter as many in judging a placement. As many
            for every 64 GPUs, where there are more: otherwise the search ends before it has been to most of them.
        seed: of the scenarios.
    """

    scenarios: int = 8
    doubt: float = 0.5
    decode_doubt: float = 0.15
    economy: float = 1e-3
    patience_iterations: int = 256
    skip: bool = True
    skip_margin: float = 0.1
    skip_caution: float = 1.0
    depth: int = 4
    fuel: int = 400
    keep: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "scenarios",
            "doubt",
            "decode_doubt",
            "economy",
            "patience_iterations",
            "skip_margin",
            "skip_caution",
            "depth",
            "fuel",
            "keep",
            "seed",
        ):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must be a number of at least 0, got {getattr(self, name)}")

    def doubt_of(self, phase: Phase) -> float:
        """The least relative spread of a forecast for this phase."""
        return float(self.decode_doubt if phase == Phase.DECODE else self.doubt)


def fuel_on(num_gpus: int, fuel: int) -> int:
    """Pairs of copies that the dispatch examines at most on so many GPUs, given ``ElasticParams.fuel``."""
    return int(fuel * max(1, num_gpus // 64))


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
    # mirrored pairs keep the scenarios' mean at the forecast's; taken in turn, so do the first of them
    return np.ascontiguousarray(np.stack([half, -half], axis=1).reshape(-1, num_experts)[:scenarios])


#: Scenarios on which a plan is checked by the cost model itself: the first mirrored pairs.
_CHECKED = 4


@lru_cache(maxsize=64)
def copy_seconds_G(spec: MoESpec, costs: CostModel, given: float | None) -> FloatArray:
    """Seconds in which an expert comes to each GPU: as given, otherwise from host memory."""
    gpus = range(costs.cluster.num_gpus)
    return np.array([costs.load_seconds(spec.expert_bytes, "host", g) if given is None else given for g in gpus])


def _choice_terms(spec: MoESpec, costs: CostModel, budget: Budget, params: ElasticParams) -> ChoiceTerms:
    gpu_E, room, extra = static_layout(budget, spec, costs.cluster.num_gpus)
    rates = rates_of(costs)
    return ChoiceTerms(
        _normal_CE(params.seed, params.scenarios, spec.E), gpu_E, room, extra, rates.a, rates.b, rates.c,
        params.depth, fuel_on(costs.cluster.num_gpus, params.fuel) // 4, float(params.economy),
        float(params.skip_caution),
    )  # fmt: skip


_NO_COPIES = np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.bool_), np.empty(0, np.bool_)


def _previous(x: PlanInput) -> tuple[Int32Array, Int32Array, BoolArray, BoolArray]:
    plan = x.previous
    if plan is None:
        return _NO_COPIES
    live = np.ones(plan.R, np.bool_)
    if x.state_R is not None:
        live = (x.state_R == InstanceState.WARM) | (x.state_R == InstanceState.LOADING)
    return plan.expert_R, plan.gpu_R, plan.primary_R, live


def skip_seconds(costs: CostModel, layer: int, params: ElasticParams) -> float:
    """What dispatch must be expected to save, or the layer is left to static EP; negative: any saving is welcome."""
    return costs.control_seconds(DISPATCH.control, layer) * (1 + params.skip_margin) if params.skip else -1.0


def plan_layer(
    x: PlanInput, *, spec: MoESpec, cluster: Cluster, costs: CostModel, budget: Budget, params: ElasticParams
) -> LayerPlan:
    """Static primaries, and the fewest extras that close the gap for loads like the forecast's.

    No extra at all where dispatch is not expected to save its own control time (the skip decision), and the previous
    extras where a change would not pay for its transfers.

    Raises:
        UserError: a GPU has no room for its static experts.
    """
    terms = _choice_terms(spec, costs, budget, params)
    size = spec.E + terms.extra
    expert_R, gpu_R, primary_R = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.bool_)
    skip = skip_seconds(costs, x.layer, params)
    horizon = x.horizon_iterations or params.patience_iterations
    count = choose(
        x.forecast.mean_E, x.forecast.var_E, params.doubt_of(x.phase), *_previous(x), horizon, float(x.lead_seconds),
        copy_seconds_G(spec, costs, x.copy_seconds), skip, terms, expert_R, gpu_R,
    )  # fmt: skip
    sort_plan(count, terms, expert_R, gpu_R, primary_R)
    plan = LayerPlan(x.layer, expert_R[:count], gpu_R[:count], primary_R[:count])
    return _where_it_pays(plan, x, skip, terms, costs, params)


def plan_layers(
    inputs_L: Sequence[PlanInput],
    *,
    spec: MoESpec,
    cluster: Cluster,
    costs: CostModel,
    budget: Budget,
    params: ElasticParams,
) -> list[LayerPlan]:
    """All layers at once, on as many threads as pay: the plans that :func:`plan_layer` makes one by one.

    Raises:
        UserError: a GPU has no room for its static experts.
    """
    terms = _choice_terms(spec, costs, budget, params)
    layers, size = len(inputs_L), spec.E + terms.extra
    expert_LR, gpu_LR = np.empty((layers, size), np.int32), np.empty((layers, size), np.int32)
    primary_LR, count_L = np.empty((layers, size), np.bool_), np.empty(layers, np.int64)
    mean_LE = np.stack([x.forecast.mean_E for x in inputs_L])
    var_LE = np.stack([x.forecast.var_E for x in inputs_L])
    doubt_L = np.array([params.doubt_of(x.phase) for x in inputs_L])
    skip_L = np.array([skip_seconds(costs, x.layer, params) for x in inputs_L])
    horizon_L = np.array([x.horizon_iterations or params.patience_iterations for x in inputs_L], np.int64)
    lead_L = np.array([x.lead_seconds for x in inputs_L], np.float64)
    copy_LG = np.stack([copy_seconds_G(spec, costs, x.copy_seconds) for x in inputs_L])
    previous_L = [_previous(x) for x in inputs_L]
    offset_L = np.concatenate([[0], np.cumsum([len(copies[0]) for copies in previous_L])]).astype(np.int64)
    expert_P, gpu_P, primary_P, live_P = (np.concatenate([copies[i] for copies in previous_L]) for i in range(4))

    def some(start: int, stop: int) -> None:
        choose_layers(
            start, stop, mean_LE, var_LE, doubt_L, offset_L, expert_P, gpu_P, primary_P, live_P, horizon_L, lead_L,
            copy_LG, skip_L, terms, expert_LR, gpu_LR, primary_LR, count_L,
        )  # fmt: skip

    in_parallel(some, layers, layers * spec.E * max(1, params.scenarios))
    plans_L = [
        LayerPlan(x.layer, expert_LR[i, :n], gpu_LR[i, :n], primary_LR[i, :n])
        for i, (x, n) in enumerate(zip(inputs_L, count_L.tolist(), strict=True))
    ]
    if costs.kernel_terms() is not None:
        return plans_L
    return [
        _where_it_pays(plan, x, skip, terms, costs, params)
        for plan, x, skip in zip(plans_L, inputs_L, skip_L.tolist(), strict=True)
    ]


def seconds_saved(load_SE: IntArray, quota_SR: IntArray, plan: LayerPlan, costs: CostModel) -> float:
    """Seconds by which quotas are faster than the primaries alone, in the cost model's own words."""
    static_SR = np.empty_like(quota_SR)
    kernels.static_quotas(load_SE, plan.expert_R, plan.primary_R, np.ones(plan.R, np.bool_), static_SR)
    return costs.layer_seconds(static_SR, plan).total - costs.layer_seconds(quota_SR, plan).total


def _where_it_pays(
    plan: LayerPlan, x: PlanInput, skip: float, terms: ChoiceTerms, costs: CostModel, params: ElasticParams
) -> LayerPlan:
    """The plan, or its primaries alone where the cost model itself sees it save no more than ``skip`` seconds.

    The search knows a cost model by straight lines. Where it is a table (of measurements), these may promise more
    than the table keeps: an exchange, say, whose time hardly depends on its bytes.
    """
    if skip < 0 or plan.num_extra == 0 or costs.kernel_terms() is not None:
        return plan
    mean_E, ranks = x.forecast.mean_E, costs.cluster.num_gpus
    normal_CE = terms.normal_CE if len(terms.normal_CE) else np.zeros((1, len(mean_E)))
    load_CE = np.empty(normal_CE.shape, np.int64)
    count = draw_scenarios(mean_E, x.forecast.var_E, params.doubt_of(x.phase), normal_CE, load_CE)
    usable, saved = np.ones(plan.R, np.bool_), 0.0
    for load_E in load_CE[: min(count, _CHECKED)]:
        load_SE = spread_over_sources(load_E, ranks)
        quota_SR = _dispatch_checked(load_SE, plan, usable, np.empty((ranks, plan.R), np.int64), costs, params)
        saved += seconds_saved(load_SE, quota_SR, plan, costs)
    if saved / min(count, _CHECKED) > skip:
        return plan
    kept = plan.primary_R
    return LayerPlan(plan.layer, plan.expert_R[kept], plan.gpu_R[kept], plan.primary_R[kept])


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
    expert_R = plan.expert_R
    if usable.shape != expert_R.shape:
        raise UserError(f"usable marks must be one per replica: {plan.R} replicas, got shape {usable.shape}")
    sources, experts = load_SE.shape
    quota_SR = np.empty((sources, len(expert_R)), np.int64)
    numbers_K = dispatch_numbers(costs)
    if numbers_K is None:
        return _dispatch_checked(load_SE, plan, usable, quota_SR, costs, params)
    kernels.best_quotas(
        load_SE, expert_R, plan.gpu_R, plan.primary_R, usable, numbers_K, params.depth,
        fuel_on(cluster.num_gpus, params.fuel), quota_SR, *_memory(sources, experts, len(expert_R), cluster.num_gpus),
    )  # fmt: skip
    return quota_SR


DISPATCH = DispatchRule(dispatch, gathers_counts=True, timed_as="elastic")


class _Memory(threading.local):
    """What each thread's dispatches work in, as large as the largest so far; a forked process has a copy of its own."""

    def __init__(self) -> None:
        self.whole, self.real = np.empty(0, np.int64), np.empty(0)
        self.fits: set[tuple[int, ...]] = set()


_local = _Memory()


def _memory(*shape: int) -> tuple[IntArray, FloatArray]:
    """This thread's working memory, enough for dispatches of one shape: sources, experts, replicas, GPUs."""
    if shape not in _local.fits:
        whole, real = kernels.working_memory(*shape)
        if whole > len(_local.whole) or real > len(_local.real):
            _local.whole = np.empty(max(whole, len(_local.whole)), np.int64)
            _local.real = np.empty(max(real, len(_local.real)))
        _local.fits.add(shape)
    return _local.whole, _local.real


@lru_cache(maxsize=64)
def dispatch_numbers(costs: CostModel) -> FloatArray | None:
    """What :func:`dispatch_kernels.best_quotas` takes as ``numbers_K``; None for a cost model that is not numbers."""
    compiled = costs.kernel_terms()
    if compiled is None:
        return None
    rates = rates_of(costs)
    return np.array([costs.cluster.num_gpus, rates.a, rates.b, rates.c, *map(float, compiled)])


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
        params.depth, fuel_on(costs.cluster.num_gpus, params.fuel), quota_SR,
        *_memory(*load_SE.shape, plan.R, costs.cluster.num_gpus),
    ):  # fmt: skip
        return static_SR
    least = costs.layer_seconds(static_SR, plan).total
    return quota_SR if costs.layer_seconds(quota_SR, plan).total < least else static_SR


PLANNER = Planner(
    name="elastic",
    plan_layer=plan_layer,
    dispatch=DISPATCH,
    plan_layers=plan_layers,
    params=ElasticParams,
    cadence="iteration",
    needs_forecast=True,
    default_predictor="history",
    source="this project: static primaries, extras by scenarios of the forecast, dispatch by chains of copies",
    timed_as="elastic",
)
