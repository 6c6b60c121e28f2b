"""The plans of an iteration, all made as it starts: forecast, asked whether they stay, planned together.

A forecast never depends on the clock. When its plan is there does: layer l + d is forecast from layer l, with d given
or chosen per layer (``predictors.distance``), so that its plan is there ``background_seconds`` after layer l starts,
and its copies begin to load at that moment. A layer that starts before its plan is there runs under the plan before.

Axes: L layers, N layers that are planned, E experts, P copies before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless.contracts import Context, FloatArray, Forecast, InstanceState, IntArray, Phase
from moeless.jit import njit
from moeless.placement.plan_rows import PlanBatch, PlanRows, PreviousCopies
from moeless.policy import LoadHistory, ResolvedPolicy
from moeless.policy.reuse import PlanReuse
from moeless.predictors.distance import NEWEST
from moeless.predictors.forecast_horizon import ForecastHorizon
from moeless.serverless import InstancePool
from moeless.serverless.kernels import expire
from moeless.simulator.work import Work

_COLD, _LOADING, _WARM = int(InstanceState.COLD), int(InstanceState.LOADING), int(InstanceState.WARM)


@dataclass(frozen=True)
class ComingPlans:
    """Plans on their way.

    Attributes:
        layer_N: their layers; each row of ``rows`` is one plan.
        asked_N: the layer at whose start each plan is asked for; -1: before the first.
    """

    layer_N: IntArray
    rows: PlanRows
    asked_N: IntArray


class IterationPlans:
    """A policy's planning, iteration after iteration.

    Attributes:
        late: plans that came after their layer had started.
        made: plans in all.
        delay: seconds from asking for a plan until it is there.
        reuse: which plans stay unasked.
    """

    def __init__(self, policy: ResolvedPolicy, pool: InstancePool, history: LoadHistory) -> None:
        self.policy, self.pool, self.history = policy, pool, history
        self.delay = policy.costs.background_seconds(policy.planner.control)
        self.late = self.made = 0
        self.reuse = PlanReuse(policy, policy.predictor)
        self._distances = policy.distance_rule(float(pool.tier_seconds.max()))
        self._distance_L = np.full(policy.spec.L, policy.policy.distance)
        self._life = ForecastHorizon(history.shares_or_even())
        # a copy comes from the next GPU that has one, and every expert is on some
        near = policy.cluster.num_gpus <= policy.cluster.island_size
        self._copy_seconds = float(pool.tier_seconds[0 if near else 1]) + pool.settings.start_seconds
        # what a layer takes, with all around it, as lately seen
        self._layer_seconds: dict[Phase, float] = {}

    def make(self, work: Work, plans: PlanRows, now: float) -> ComingPlans | None:
        """Plan all layers whose plans do not stay; None where all do."""
        policy = self.policy
        if self._distances is not None:
            self._distance_L = self._distances.choose(work.phase, work.tokens)
        known = policy.predictor.from_history
        layer_N = np.arange(policy.spec.L)
        if known and self.reuse.steps.active:
            layer_N = np.flatnonzero(~self.reuse.kept_by_history(self.history.weight_LE, work.tokens * policy.spec.K))
            if not len(layer_N):
                return None
        if known:
            mean_NE = var_NE = self._from_history(layer_N, work.tokens)
            horizon_N = np.zeros(len(layer_N), np.int64)
        else:
            mean_NE, var_NE, horizon_N = self._forecasts(layer_N, work)
            left = np.flatnonzero(~self.reuse.kept_N(layer_N, mean_NE, var_NE))
            if not len(left):
                return None
            layer_N, mean_NE, var_NE, horizon_N = layer_N[left], mean_NE[left], var_NE[left], horizon_N[left]
        distance_N = self._distance_L[layer_N]
        # a layer that none precedes by its distance is planned from what is known since the last iteration
        first_N = layer_N < distance_N
        ahead_N, delay_N = np.where(first_N, layer_N, distance_N), np.where(first_N, 0.0, self.delay)
        lead_N = np.maximum(ahead_N * self._layer_seconds.get(work.phase, 0.0) - delay_N, 0.0)
        source = "history" if known else policy.policy.predictor
        batch = PlanBatch(
            layer_N, work.phase, mean_NE, var_NE, work.tokens, source, self._copies_before(layer_N, plans, now),
            horizon_N, lead_N, self._copy_seconds,
        )  # fmt: skip
        rows = policy.planner.plan_many(batch, policy.setting)
        self.reuse.note(layer_N, mean_NE, rows)
        self.made += len(layer_N)
        return ComingPlans(layer_N, rows, np.where(first_N, -1, layer_N - distance_N))

    def ran(self, phase: Phase, seconds_L: FloatArray, late: int) -> None:
        """An iteration that planned has run.

        Args:
            seconds_L: what each layer took, with all around it.
            late: its plans that came too late.
        """
        self.late += late
        for layer, seconds in enumerate(seconds_L.tolist()):
            known = self._layer_seconds.setdefault(phase, seconds)
            self._layer_seconds[phase] = known + NEWEST * (seconds - known)
            if self._distances is not None:
                self._distances.note(layer, phase, seconds)

    def _from_history(self, layer_N: IntArray, tokens: int) -> FloatArray:
        """Past load shares times the iteration's tokens, equal shares where nothing is known, ``[N, E]``."""
        weight_NE = self.history.weight_LE[layer_N]
        total_N = weight_NE.sum(1)
        if not total_N.all():
            weight_NE[total_N == 0.0] = 1.0
            total_N = weight_NE.sum(1)
        weight_NE *= (tokens * self.policy.spec.K / total_N)[:, None]
        return weight_NE

    def _forecasts(self, layer_N: IntArray, work: Work) -> tuple[FloatArray, FloatArray, IntArray]:
        """Mean and variance of the predictor's forecasts ``[N, E]``, and the iterations for which each holds."""
        shape = len(layer_N), self.policy.spec.E
        mean_NE, var_NE, horizon_N = np.empty(shape), np.empty(shape), np.empty(len(layer_N), np.int64)
        for n, layer in enumerate(layer_N.tolist()):
            forecast = self._forecast(layer, int(self._distance_L[layer]), work)
            mean_NE[n], var_NE[n] = forecast.mean_E, forecast.var_E
            horizon_N[n] = self._life.horizon(layer, work.phase, forecast, self.history.share(layer))
        return mean_NE, var_NE, horizon_N

    def _forecast(self, target: int, distance: int, work: Work) -> Forecast:
        """The forecast for a layer from the one ``distance`` before it, or from the past where there is none."""
        predictor, source = self.policy.predictor, target - distance
        if source < 0 and not predictor.forecasts_first:
            return self.policy.from_share(self.history.share(target), work.tokens)
        inputs, topk = work.router_input_TLH, work.topk_TLK
        context: Context = self.history.context(
            target,
            work.tokens,
            work.phase,
            router_input_TH=None if inputs is None or source < 0 else inputs[:, source],
            topk_TK=None if topk is None or source < 0 else topk[:, source],
            true_load_E=work.load_LE[target],
            token_T=work.token_T,
        )
        forecast: Forecast = predictor.predict(context, source, distance)
        return forecast

    def _copies_before(self, layer_N: IntArray, plans: PlanRows, now: float) -> PreviousCopies:
        before: PreviousCopies = _copies(layer_N, plans, now, self.pool.state)
        return before


@njit(cache=True, nogil=True)
def _copies(layer_N, plans, now, pool):  # type: ignore[no-untyped-def]
    """The plans in force with lingering copies as further extras; what has lingered too long is freed before."""
    count, total = len(layer_N), 0
    first_N, fixed_N = np.zeros(count + 1, np.int64), np.empty(count, np.bool_)
    for n in range(count):
        total += plans.count_N[layer_N[n]] + expire(layer_N[n], now, pool)
        first_N[n + 1], fixed_N[n] = total, plans.fixed_N[layer_N[n]]
    before = PreviousCopies(
        first_N, np.empty(total, np.int32), np.empty(total, np.int32), np.empty(total, np.bool_),
        np.empty(total, np.uint8), np.empty(total), fixed_N,
    )  # fmt: skip
    _list_copies(layer_N, plans, now, pool, before)
    return before


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _list_copies(layer_N, plans, now, pool, before):  # type: ignore[no-untyped-def]
    """Fill all but the numbers of copies, in a plan's order."""
    first_N, expert_P, gpu_P, primary_P, state_P, share_P, fixed_N = before
    experts, gpus = pool.born_LEG.shape[1], pool.born_LEG.shape[2]
    for n in range(len(layer_N)):
        layer, at = layer_N[n], first_N[n]
        born_EG, planned_EG, ready_EG = pool.born_LEG[layer], pool.planned_LEG[layer], pool.ready_LEG[layer]
        expert_R, gpu_R, primary_R = plans.expert_NR[layer], plans.gpu_NR[layer], plans.primary_NR[layer]
        share_R, count, r = plans.share_NR[layer], plans.count_N[layer], 0
        lingers = first_N[n + 1] - first_N[n] > count
        for g in range(gpus if lingers else 1):
            begin = at
            while r < count and (gpu_R[r] == g or not lingers):
                expert_P[at], gpu_P[at], primary_P[at] = expert_R[r], gpu_R[r], primary_R[r]
                share_P[at] = share_R[r] if fixed_N[n] else 0.0
                r += 1
                at += 1
            for e in range(experts if lingers else 0):
                if born_EG[e, g] != np.inf and not planned_EG[e, g]:
                    i = at
                    at += 1
                    while i > begin and not primary_P[i - 1] and expert_P[i - 1] > e:
                        expert_P[i], gpu_P[i], primary_P[i] = expert_P[i - 1], g, False
                        share_P[i] = share_P[i - 1]
                        i -= 1
                    expert_P[i], gpu_P[i], primary_P[i], share_P[i] = e, g, False, 0.0
        for p in range(first_N[n], at):
            ready = ready_EG[expert_P[p], gpu_P[p]]
            state_P[p] = _WARM if ready <= now else _LOADING if ready != np.inf else _COLD
