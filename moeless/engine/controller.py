"""Deciding, on every rank alike, where copies live and which of them serve which tokens.

Each MoE layer has one gather. It carries this rank's token counts, its part of forecasts, and which copies of this
layer are complete or on their way. The forecast for the next layer is made before this gather; one for a later layer
beside this layer's experts, and carried by the next gather; one from past loads alone is the same on every rank and
travels not at all. A predictor that forecasts the first layers, which no layer precedes by the distance, adds one
gather before them. From the gathered words every rank computes the same quotas, the same next plan and the same moves,
so nothing else has to be agreed upon.

Plans are made on a thread beside the model and adopted by all ranks at the same point: those of a layer ahead when
the next layer begins, an interval planner's (EPLB) when the next iteration begins.

Axes: T tokens of this rank, K top-k, S source ranks, E experts, R replicas of a layer, L MoE layers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moeless.contracts import BoolArray, Context, Forecast, InstanceState, IntArray, LayerPlan, Phase
from moeless.engine.core import PartTimes
from moeless.engine.exchange import Exchange
from moeless.engine.forecasting import Forecasting
from moeless.engine.moves import Held, moves_to, num_words, pack
from moeless.engine.options import CopySource
from moeless.engine.planning import Planning
from moeless.engine.store import ReplicaStore
from moeless.policy import LoadHistory, ResolvedPolicy
from moeless.policy.resolved import INTERVAL_ITERATIONS
from moeless.policy.reuse import PlanReuse
from moeless.predictors.distance import DistanceRule
from moeless.predictors.forecast_horizon import ForecastHorizon
from moeless.serverless import KeepAlive


@dataclass(frozen=True)
class Decision:
    """One layer of one iteration: the plan in force, tokens of each source rank for each replica."""

    plan: LayerPlan
    quota_SR: IntArray
    load_SE: IntArray
    warm: int


@dataclass(frozen=True)
class ControlSettings:
    """How the controller behaves.

    Attributes:
        replan_seconds: between plans of an interval planner (EPLB).
        keep_alive: of unplanned copies, for planners that plan per iteration.
        skip_below_tokens: iterations of fewer tokens over all ranks use primaries only, forecast nothing and carry
            counts alone; 0 never skips. Chosen ahead, since every rank knows an iteration's tokens.
        plan_every: iterations from one plan of an ``iteration`` planner to the next.
        copy_from: where copies come from.
    """

    replan_seconds: float = 2.0
    keep_alive: KeepAlive = field(default_factory=KeepAlive)
    skip_below_tokens: int = 0
    plan_every: int = 1
    copy_from: CopySource = "auto"


class Controller:
    """A policy at work on this rank.

    Args:
        exchange: the collectives; all ranks make the same calls in the same order.
        store: this rank's copies.
    """

    def __init__(
        self, policy: ResolvedPolicy, exchange: Exchange, store: ReplicaStore, settings: ControlSettings
    ) -> None:
        self.policy, self.exchange, self.store, self.settings = policy, exchange, store, settings
        self.spec, self.rank, self.world = policy.spec, exchange.ranks.rank, exchange.ranks.world
        self.history = LoadHistory(None, self.spec.L, self.spec.E, self.spec.K)
        self.ahead = policy.planner.cadence == "iteration" and policy.predictor is not None
        self.keep_alive = settings.keep_alive if self.ahead else KeepAlive("fixed", 0.0)
        self.plans = policy.first_plans()
        # as last gathered, equal on all ranks
        self._held_L = [Held.of_plan(plan, self.world, self.spec.E) for plan in self.plans]
        self._next_replan = settings.replan_seconds
        self._phase, self._tokens, self._now, self._skip = Phase.MIXED, 0, 0.0, False
        self._plans_now, self._since_plan, self._carried = False, 0, 0.0
        self.reuse = PlanReuse(policy, policy.predictor)
        self._asked: dict[int, Forecast] = {}
        self.life = ForecastHorizon(self.history.shares_or_even())
        tiers = ("peer", "host") if settings.copy_from == "auto" else (settings.copy_from,)
        self._copy_seconds = min(policy.costs.load_seconds(self.spec.expert_bytes, tier, 0) for tier in tiers)
        # at which distance each target is forecast: given, or chosen anew for every iteration
        self._distance_L = np.full(self.spec.L, policy.policy.distance)
        self.rule = self._distance_rule() if self.ahead else None
        self._layer_started, self._carried_exchange = 0.0, 0.0
        # what the predictor reads of the iteration; past loads are known to every rank
        self._reads = policy.predictor.reads if self.ahead else "nothing"
        self._carried_targets: list[int] = []
        self.planning, self.forecasting = Planning(policy), Forecasting(exchange.ranks.device)
        if policy.predictor is not None:
            policy.predictor.to(exchange.ranks.device)
        store.deploy([self._own(plan) for plan in self.plans], self.keep_alive, 0.0)

    def close(self) -> None:
        """End the threads; plans that were not adopted are dropped."""
        self.forecasting.close()
        self.planning.close()

    def _own(self, plan: LayerPlan) -> list[int]:
        return np.unique(plan.expert_R[plan.gpu_R == self.rank]).tolist()

    def _distance_rule(self) -> DistanceRule | None:
        load_seconds, size = self.policy.costs.load_seconds, self.spec.expert_bytes
        return self.policy.distance_rule(max(load_seconds(size, tier, 0) for tier in ("peer", "peer-slow", "host")))

    def begin(self, phase: Phase, tokens: int, now: float, token_T: IntArray | None = None) -> None:
        """Start an iteration; collective where the predictor forecasts the first layers.

        Args:
            tokens: over all ranks; ``now``: equal on all of them.
            token_T: ids of this rank's tokens, where it has some.
        """
        started = time.thread_time()
        self._phase, self._tokens, self._now = phase, tokens, now
        self._skip = self.ahead and tokens < self.settings.skip_below_tokens
        if self.policy.planner.cadence == "interval":
            self._adopt_planned()
            if now >= self._next_replan:
                self._next_replan = now + self.settings.replan_seconds
                mean = max(1, round(self.history.mean_tokens or 1))
                for layer in range(self.spec.L):
                    self._plan(layer, self.policy.from_share(self.history.share(layer), mean), INTERVAL_ITERATIONS)
        self._plans_now = self.ahead and not self._skip and self._since_plan % self.settings.plan_every == 0
        self._since_plan += 1
        if self._plans_now:
            if self.rule is not None:
                self._distance_L = self.rule.choose(phase, tokens)
            first = [target for target in range(self.spec.L) if target < self._distance_L[target]]
            for target, forecast in zip(first, self._forecast_first(first, token_T), strict=True):
                self._plan(target, forecast)
        # the first layer's record is charged with it
        self._carried += time.thread_time() - started

    def _forecast_first(self, targets: list[int], token_T: IntArray | None) -> list[Forecast]:
        """Layers that nothing precedes: by the predictor where it knows how, which takes a gather; else history."""
        if not targets or not self.policy.predictor.forecasts_first:
            return [self.policy.from_share(self.history.share(target), self._tokens) for target in targets]
        words = [self._first_words(target, int(self._distance_L[target]), token_T) for target in targets]
        began = time.perf_counter()
        words_S = self.exchange.gather(np.concatenate(words))
        self._carried_exchange += time.perf_counter() - began
        parts = np.split(words_S, len(targets), axis=1)
        return [self._summed(part_S) for part_S in parts]

    def _first_words(self, target: int, distance: int, token_T: IntArray | None) -> IntArray:
        """This rank's part of a first layer's forecast."""
        if token_T is None or not len(token_T):
            return np.zeros(2 * self.spec.E, np.int64)
        context = self._context(target, len(token_T), token_T=token_T)
        return _words(self.policy.predictor.predict(context, target - distance, distance))

    def _plan(self, layer: int, forecast: Forecast, horizon: int = 0) -> None:
        plan, held = self.plans[layer], self._held_L[layer]
        if self.ahead:
            here_R = (held.ready_GE | held.busy_GE)[plan.gpu_R, plan.expert_R]
            if here_R.all() and self.reuse.keeps(layer, forecast):
                return
            self._asked[layer] = forecast
            # when a layer begins differs from rank to rank, plans must not: no lead is counted on
            horizon = self.life.horizon(layer, self._phase, forecast, self.history.share(layer))
        state_R = np.where(held.ready_R(plan), InstanceState.WARM, InstanceState.LOADING)
        phase = self._phase if self.ahead else Phase.MIXED
        self.planning.ask(layer, phase, forecast, plan, state_R.astype(np.uint8), horizon, self._copy_seconds)

    def _adopt_planned(self) -> None:
        for plan in self.planning.collect():
            layer, bytes_ = plan.layer, self.spec.expert_bytes
            moves = moves_to(plan, self._held_L[layer], self.policy.costs, bytes_, self.settings.copy_from)
            self.plans[layer] = plan
            if layer in self._asked:
                self.reuse.note_plan(self._asked.pop(layer), plan)
            self.store.provision(layer, self._own(plan), self._now, moves)

    def decide(self, layer: int, hidden_TH: torch.Tensor, topk_TK: torch.Tensor, times: PartTimes) -> Decision:
        """Gather, forecast, have the layer at the distance planned, and assign this layer's tokens.

        Raises:
            RunFailed: an expert that tokens need cannot be brought into memory.
        """
        started = time.thread_time()
        if self.ahead:
            self._adopt_planned()
        self.planning.settle(times)
        plan, E, L = self.plans[layer], self.spec.E, self.spec.L
        targets = [t for t in range(layer + 1, L) if self._plans_now and self._distance_L[t] == t - layer]
        if self._reads == "nothing":
            self._plan_from_past(layer, targets, times)
            targets = []
        near = [t for t in targets if t == layer + 1]
        # made at the layer before, and this layer's own
        told = [*self._carried_targets, *near]
        tells = self._moves and not self._skip
        words = self.forecasting.collect(times)
        began = time.thread_time()
        soon = [self._forecast_words(layer, target, hidden_TH, topk_TK) for target in near]
        times.forecast += time.thread_time() - began
        # the layer's one wait for the device
        ids_TK = topk_TK.cpu().numpy()
        parts = [np.bincount(ids_TK.reshape(-1), minlength=E).astype(np.int64)]
        parts += ([words] if words is not None else []) + soon
        if self.rule is not None:
            parts.append(self._seconds_word())
        if tells:
            parts.append(pack(*self.store.held(layer)))
        times.control += time.thread_time() - started + self._carried
        self._carried = 0.0

        began = time.perf_counter()
        words_S = self.exchange.gather(np.concatenate(parts))
        times.gather = time.perf_counter() - began
        times.exchange += times.gather + self._carried_exchange
        self._carried_exchange = 0.0

        started = time.thread_time()
        load_SE = words_S[:, :E]
        if tells:
            self._held_L[layer] = Held.unpack(words_S[:, -num_words(E) :], E)
        for index, target in enumerate(told):
            self._plan(target, self._summed(words_S[:, (1 + 2 * index) * E : (3 + 2 * index) * E]))
        if self.rule is not None and layer > 0:
            # the slowest rank's time is the layer's
            at = (1 + 2 * len(told)) * E
            seconds_S = np.ascontiguousarray(words_S[:, at]).view(np.float64)
            self.rule.note(layer - 1, self._phase, float(seconds_S.max()))
        began = time.thread_time()
        usable_R = self._usable(plan)
        quota_SR = self.policy.dispatch(load_SE, plan, usable_R)
        times.dispatch += time.thread_time() - began
        self.history.add_layer(layer, load_SE.sum(0), self._phase, self._tokens)
        self._carried_targets = [t for t in targets if t > layer + 1]
        if self._carried_targets:
            far = self._carried_targets
            self.forecasting.ask(
                lambda: np.concatenate([self._forecast_words(layer, t, hidden_TH, topk_TK, ids_TK) for t in far]),
                hidden_TH,
            )
        times.control += time.thread_time() - started
        for r in np.flatnonzero((plan.gpu_R == self.rank) & (quota_SR.sum(0) > 0)).tolist():
            if not self.store.ready(layer, int(plan.expert_R[r])):
                times.stall += self.store.wait(layer, int(plan.expert_R[r]))
        return Decision(plan, quota_SR, load_SE, int(usable_R.sum()))

    def _usable(self, plan: LayerPlan) -> BoolArray:
        ready_R = self._held_L[plan.layer].ready_R(plan)
        return plan.primary_R & ready_R if self._skip else ready_R

    @property
    def _moves(self) -> bool:
        """Whether copies may be on their way, so that readiness has to be told."""
        return self.policy.planner.cadence != "once"

    def _plan_from_past(self, layer: int, targets: list[int], times: PartTimes) -> None:
        """Plan from past loads, which every rank knows alike; the gather hides the planner's time."""
        for target in targets:
            began = time.thread_time()
            forecast = self.policy.predictor.predict(self._context(target, self._tokens), layer, target - layer)
            times.forecast += time.thread_time() - began
            self._plan(target, forecast)

    def _forecast_words(
        self, layer: int, target: int, hidden_TH: torch.Tensor, topk_TK: torch.Tensor, ids_TK: IntArray | None = None
    ) -> IntArray:
        """This rank's part of a forecast."""
        if not len(topk_TK):
            return np.zeros(2 * self.spec.E, np.int64)
        # gate inputs stay where they are: only the sums leave the device
        read: dict[str, Any] = {"router_input_TH": hidden_TH}
        if self._reads == "topk":
            read = {"topk_TK": topk_TK.cpu().numpy() if ids_TK is None else ids_TK}
        return _words(self.policy.predictor.predict(self._context(target, len(topk_TK), **read), layer, target - layer))

    def _context(self, target: int, tokens: int, **inputs: Any) -> Context:
        """What is known of a target, with what this rank sees of the iteration."""
        return self.history.context(target, tokens, self._phase, **inputs)

    def _summed(self, words_S: IntArray) -> Forecast:
        """The ranks' parts as one forecast; variances add."""
        total = np.ascontiguousarray(words_S).view(np.float64).sum(0)
        mean_E, var_E = np.split(total, 2)
        return Forecast(mean_E, var_E, self._tokens, self.policy.policy.predictor)

    def _seconds_word(self) -> IntArray:
        """What the layer before took on this rank, from its start to now, as the bits of a float64."""
        now = time.perf_counter()
        seconds, self._layer_started = now - self._layer_started, now
        return np.array([seconds]).view(np.int64)


def _words(forecast: Forecast) -> IntArray:
    """Mean and variance as the bits of float64."""
    return np.concatenate([forecast.mean_E, forecast.var_E]).view(np.int64)
