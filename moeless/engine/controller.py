"""Deciding, on every rank alike, where copies live and which of them serve which tokens.

Each MoE layer has one gather. It carries this rank's token counts, its part of the forecast for the layer at the
policy's distance, and which planned copies of this layer are complete. From the gathered words every rank computes
the same quotas and the same next plan, so nothing else has to be agreed upon.

Axes: T tokens of this rank, K top-k, S source ranks, E experts, R replicas of a layer, L MoE layers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from moeless.contracts import BoolArray, Context, Forecast, InstanceState, IntArray, LayerPlan, Phase
from moeless.engine.core import PartTimes
from moeless.engine.exchange import Exchange
from moeless.engine.history import LiveHistory
from moeless.engine.policy import LONG_HORIZON, LivePolicy
from moeless.engine.store import ReplicaStore


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
        keep_alive: seconds that unplanned copies stay in memory.
        skip_below_tokens: iterations of fewer tokens over all ranks use primaries only, forecast nothing and carry
            counts alone; 0 never skips. Chosen ahead, since every rank knows an iteration's tokens.
        plan_every: iterations from one plan of an ``iteration`` planner to the next.
    """

    replan_seconds: float = 2.0
    keep_alive: float = 10.0
    skip_below_tokens: int = 0
    plan_every: int = 1


class Controller:
    """A policy at work on this rank.

    Args:
        exchange: the collectives; all ranks make the same calls in the same order.
        store: this rank's copies.
    """

    def __init__(self, policy: LivePolicy, exchange: Exchange, store: ReplicaStore, settings: ControlSettings) -> None:
        self.policy, self.exchange, self.store, self.settings = policy, exchange, store, settings
        self.spec, self.rank = policy.spec, exchange.ranks.rank
        self.history = LiveHistory(self.spec.L, self.spec.E)
        self.ahead = policy.planner.cadence == "iteration" and policy.predictor is not None
        self.keep_alive = settings.keep_alive if self.ahead else 0.0
        self.plans = [policy.first_plan(layer, None) for layer in range(self.spec.L)]
        # readiness as last gathered, equal on all ranks
        self._ready_LR: list[BoolArray] = [np.ones(plan.R, np.bool_) for plan in self.plans]
        self._next_replan = settings.replan_seconds
        self._phase, self._tokens, self._now, self._skip = Phase.MIXED, 0, 0.0, False
        self._planning, self._since_plan = False, 0
        store.deploy([self._own(plan) for plan in self.plans], self.keep_alive, 0.0)
        self._warm_up()

    def _warm_up(self) -> None:
        """Run the planner's and dispatcher's kernels once, so that no iteration compiles them."""
        plan = self.policy.plan(0, Phase.MIXED, self.policy.from_share(None, 16), self.plans[0], None)
        load_SE = np.ones((self.exchange.ranks.world, self.spec.E), np.int64)
        self.policy.dispatch(load_SE, plan, np.ones(plan.R, np.bool_))

    def _own(self, plan: LayerPlan) -> list[int]:
        return np.unique(plan.expert_R[plan.gpu_R == self.rank]).tolist()

    def begin(self, phase: Phase, tokens: int, now: float) -> None:
        """Start an iteration of so many tokens over all ranks; ``now`` is equal on all of them."""
        self._phase, self._tokens, self._now = phase, tokens, now
        self._skip = self.ahead and tokens < self.settings.skip_below_tokens
        if self.policy.planner.cadence == "interval" and now >= self._next_replan:
            self._next_replan = now + self.settings.replan_seconds
            for layer in range(self.spec.L):
                mean = max(1, round(self.history.mean_tokens(layer) or 1))
                forecast = self.policy.from_share(self.history.share(layer), mean)
                self._adopt(self.policy.plan(layer, Phase.MIXED, forecast, self.plans[layer], None, LONG_HORIZON))
        self._planning = self.ahead and not self._skip and self._since_plan % self.settings.plan_every == 0
        self._since_plan += 1
        if self._planning:
            for layer in range(min(self.policy.policy.distance, self.spec.L)):
                self._replan(layer, self.policy.from_share(self.history.share(layer), tokens))

    def _replan(self, layer: int, forecast: Forecast) -> None:
        ready_R = self._ready_LR[layer]
        state_R = np.where(ready_R, InstanceState.WARM, InstanceState.LOADING).astype(np.uint8)
        self._adopt(self.policy.plan(layer, self._phase, forecast, self.plans[layer], state_R))

    def _adopt(self, plan: LayerPlan) -> None:
        old, layer = self.plans[plan.layer], plan.layer
        known = {
            (int(e), int(g)): bool(r) for e, g, r in zip(old.expert_R, old.gpu_R, self._ready_LR[layer], strict=True)
        }
        self._ready_LR[layer] = np.array(
            [known.get((int(e), int(g)), False) for e, g in zip(plan.expert_R, plan.gpu_R, strict=True)], np.bool_
        )
        self.plans[layer] = plan
        self.store.provision(layer, self._own(plan), self._now)

    def decide(self, layer: int, hidden_TH: torch.Tensor, topk_TK: torch.Tensor, times: PartTimes) -> Decision:
        """Gather, forecast, plan the layer at the distance, and assign this layer's tokens.

        Raises:
            RunFailed: an expert that tokens need cannot be brought into memory.
        """
        started = time.thread_time()
        ids_TK = topk_TK.cpu().numpy()
        plan, E = self.plans[layer], self.spec.E
        target = layer + self.policy.policy.distance
        forecasts = self._planning and target < self.spec.L
        parts = [np.bincount(ids_TK.reshape(-1), minlength=E).astype(np.int64)]
        if forecasts:
            parts.append(self._forecast_words(layer, target, hidden_TH, ids_TK))
        if self._moves and not self._skip:
            own_R = plan.gpu_R == self.rank
            bits = [own and self.store.ready(layer, int(e)) for own, e in zip(own_R, plan.expert_R, strict=True)]
            parts.append(np.array(bits, np.int64))
        times.control += time.thread_time() - started

        began = time.perf_counter()
        words_S = self.exchange.gather(np.concatenate(parts))
        times.exchange += time.perf_counter() - began

        started = time.thread_time()
        load_SE = words_S[:, :E]
        if self._moves and not self._skip:
            self._ready_LR[layer] = words_S[:, -plan.R :].sum(0) > 0
        usable_R = plan.primary_R & self._ready_LR[layer] if self._skip else self._ready_LR[layer]
        if forecasts:
            self._plan_ahead(target, words_S[:, E : 3 * E])
        quota_SR = self.policy.dispatch(load_SE, plan, usable_R)
        self.history.add(layer, load_SE.sum(0), self._phase, self._tokens)
        times.control += time.thread_time() - started
        for r in np.flatnonzero((plan.gpu_R == self.rank) & (quota_SR.sum(0) > 0)).tolist():
            if not self.store.ready(layer, int(plan.expert_R[r])):
                times.stall += self.store.wait(layer, int(plan.expert_R[r]))
        return Decision(plan, quota_SR, load_SE, int(usable_R.sum()))

    @property
    def _moves(self) -> bool:
        """Whether copies may be on their way, so that readiness has to be told."""
        return self.policy.planner.cadence != "once"

    def _forecast_words(self, layer: int, target: int, hidden_TH: torch.Tensor, ids_TK: IntArray) -> IntArray:
        """This rank's part of the forecast as the bits of float64 mean and variance."""
        E = self.spec.E
        if not len(ids_TK):
            return np.zeros(2 * E, np.int64)
        inputs = hidden_TH.float().cpu().numpy() if self.policy.predictor.reads == "router_inputs" else None
        forecast = self.policy.predictor.predict(
            Context(
                router_input_TH=inputs,
                topk_TK=ids_TK,
                history_E=self.history.share(target),
                last_load_E=self.history.last(target, self._phase),
                tokens=len(ids_TK),
                phase=self._phase,
            ),
            layer,
            target - layer,
        )
        return np.concatenate([forecast.mean_E, forecast.var_E]).view(np.int64)

    def _plan_ahead(self, target: int, words_S: IntArray) -> None:
        E = self.spec.E
        total = np.ascontiguousarray(words_S).view(np.float64).sum(0)
        forecast = Forecast(total[:E], total[E:], self._tokens, self.policy.policy.predictor)
        self._replan(target, forecast)
