"""How one iteration's MoE layers run: the plans in force, what is warm, what each layer takes.

A stage holds a policy's state between iterations. ``run`` walks the layers of one iteration on the clock: a
forecast made when layer l starts decides layer l + d's copies, their loading begins at that moment, and layer
l + d uses the copies that are warm when it starts. A layer waits only for an expert that has tokens and no warm
copy at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import BoolArray, Context, FloatArray, Forecast, Int32Array, IntArray, LayerPlan, Phase
from moeless.costs.kernels import quota_time
from moeless.costs.nonexpert import NonExpertCosts, NonExpertTime
from moeless.errors import RunFailed
from moeless.placement.dispatch import even_dispatch
from moeless.serverless import InstancePool
from moeless.simulator import kernels
from moeless.simulator.history import DECAY, LoadHistory
from moeless.simulator.record import LayerRecord
from moeless.simulator.routing import Replay, SpanColumns, balanced_loads, balanced_topk
from moeless.simulator.runtime import INTERVAL_ITERATIONS, PolicyRuntime

#: Steady decode steps that are simulated in one go, at most.
LONGEST_RUN = 4096


@dataclass(frozen=True)
class Work:
    """One iteration as the layers see it; the optional arrays are filled where the predictor reads them."""

    load_LSE: IntArray
    phase: Phase
    tokens: int
    topk_TLK: NDArray[np.uint16] | None = None
    router_input_TLH: NDArray[Any] | None = None


class Stage:
    """A policy at work.

    Args:
        runtime: the policy's parts.
        pool: where its copies live.
        history: loads known so far; the caller adds each iteration's after ``run``, ``repeat`` adds its own.
        record: where layer times go.
        replan_seconds: how often an ``interval`` planner plans.
    """

    def __init__(
        self,
        runtime: PolicyRuntime,
        pool: InstancePool,
        history: LoadHistory,
        record: LayerRecord,
        replan_seconds: float,
    ) -> None:
        self.runtime, self.pool, self.history, self.record = runtime, pool, history, record
        self.replan_seconds = replan_seconds
        self.spec, self.cluster, self.costs = runtime.spec, runtime.cluster, runtime.costs
        self.cadence = runtime.planner.cadence
        self.terms = self.costs.kernel_terms()
        layers = range(self.spec.L)
        self.plans = [runtime.deployment(history.share(layer), layer) for layer in layers]
        self.control_L = np.array([self.costs.control_seconds(runtime.policy, layer) for layer in layers])
        self._misc = self.costs.misc_seconds()
        self._even = runtime.planner.dispatch is even_dispatch
        self._pending: list[LayerPlan] | None = None
        self._planned_at = 0.0
        self._next_change = replan_seconds if self.cadence == "interval" else np.inf
        pool.deploy(self.plans, 0.0)
        self._adopt()

    def _adopt(self) -> None:
        """Hold the plans as padded arrays until the next change."""
        self._count_L = np.array([plan.R for plan in self.plans], np.int64)
        shape = (self.spec.L, int(self._count_L.max()))
        self._expert_LR, self._gpu_LR = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
        for layer, plan in enumerate(self.plans):
            self._expert_LR[layer, : plan.R], self._gpu_LR[layer, : plan.R] = plan.expert_R, plan.gpu_R
        self._single = bool((self._count_L == self.spec.E).all())

    @property
    def _first_gpu_E(self) -> Int32Array:
        """Where the first layer's primaries are, ``[E]``."""
        gpu_E = np.empty(self.spec.E, np.int32)
        gpu_E[self.plans[0].expert_R[self.plans[0].primary_R]] = self.plans[0].gpu_R[self.plans[0].primary_R]
        return gpu_E

    @property
    def _compiled(self) -> bool:
        """Whether an iteration is one compiled call: known terms, fixed plans, and no choice of copies or even ones."""
        return self.terms is not None and self.cadence != "iteration" and (self._single or self._even)

    def run(self, work: Work, now: float, other: NonExpertTime) -> float:
        """Run one iteration's layers from ``now`` on; returns when the last of them ended."""
        if self.runtime.lossy:
            work = Work(balanced_loads(work.load_LSE, self._first_gpu_E), work.phase, work.tokens)
        if self.cadence == "interval":
            self._replan(now)
        if not self._compiled:
            return self._run_layers(work, now, other)
        time_IL = np.empty((1, self.spec.L))
        kernels.even_layers(
            work.load_LSE,
            self._expert_LR,
            self._gpu_LR,
            self._count_L,
            self.terms,
            self._misc,
            self.control_L,
            self.cluster.G,
            self.record.tally,
            time_IL[0],
        )
        self.record.append(time_IL)
        return now + float(time_IL.sum()) + self.spec.L * other.per_moe_layer

    def repeat(
        self, spans: SpanColumns, replay: Replay, steps: int, now: float, deadline: float, other: NonExpertCosts
    ) -> FloatArray:
        """Run up to ``steps`` decode iterations of one batch, each beginning before ``deadline``.

        Returns when each ended, ``[I]``; empty where this stage cannot tell ahead what they do.
        """
        if not self._compiled or steps < 2:
            return np.empty(0)
        if self.cadence == "interval":
            self._replan(now)
        steps = min(steps, LONGEST_RUN)
        time_IL, end_I = np.empty((steps, self.spec.L)), np.empty(steps)
        learns = self.cadence == "interval"
        topk_TLK, row_F, index_N = replay.topk_TLK, replay.row_F, replay.base_N[spans.request_N] + spans.start_N
        if self.runtime.lossy:
            # the override depends on nothing but how many tokens each rank has: every step and layer alike
            size = len(index_N)
            topk_NK = balanced_topk(spans.rank_N, self._first_gpu_E, self.cluster.G, self.spec.K)
            topk_TLK = np.ascontiguousarray(np.broadcast_to(topk_NK[:, None], (size, self.spec.L, self.spec.K)))
            row_F = np.repeat(np.arange(size, dtype=np.uint32), steps)
            index_N = np.arange(size) * steps
        done = kernels.decode_run(
            topk_TLK,
            row_F,
            index_N,
            spans.start_N,
            spans.rank_N,
            steps,
            now,
            min(deadline, self._next_change),
            self._expert_LR,
            self._gpu_LR,
            self._count_L,
            self._single,
            self.terms,
            self._misc,
            self.control_L,
            other.terms,
            self.cluster.G,
            self.spec.E,
            self.history.weight_LE if learns else self.history.weight_LE[:0],
            DECAY,
            self.record.tally,
            time_IL,
            end_I,
        )
        self.record.append(time_IL[:done])
        self.history.count(done, done * len(spans.request_N))
        return end_I[:done]

    def _run_layers(self, work: Work, now: float, other: NonExpertTime) -> float:
        layers = self.spec.L
        planned = self.cadence == "iteration"
        distance = self.runtime.policy.distance
        time_IL = np.empty((1, layers))
        clock = now
        if planned:
            # layers that nothing precedes by the distance are planned as the iteration starts, from history
            for layer in range(min(distance, layers)):
                self._plan(layer, self._from_history(layer, work), work.phase, clock)
        all_replicas = sum(plan.R for plan in self.plans)
        for layer in range(layers):
            clock += other.per_moe_layer
            target = layer + distance
            if planned and target < layers:
                self._plan(target, self._forecast(layer, target, work), work.phase, clock)
            plan, load_SE, stall, warm = self.plans[layer], work.load_LSE[layer], 0.0, self.plans[layer].R
            if planned:
                warm = int((self.pool.ready_at(plan) <= clock).sum())
                usable_R, stall = self._wait(plan, load_SE, clock)
            else:
                usable_R = np.ones(plan.R, np.bool_)
            quota_SR = self.runtime.dispatch(load_SE, plan, usable_R)
            expert, exchange, load_G = self._layer_time(quota_SR, plan)
            active = int(quota_SR.any(0).sum())
            seconds = kernels.tally_layer(
                self.record.tally,
                expert,
                exchange,
                self._misc,
                self.control_L[layer],
                stall,
                load_G,
                plan.R,
                all_replicas,
                active,
                warm,
            )
            self.record.stalls["cold"] += stall
            time_IL[0, layer] = seconds
            clock += seconds
        self.record.append(time_IL)
        return clock

    def _layer_time(self, quota_SR: IntArray, plan: LayerPlan) -> tuple[float, float, FloatArray]:
        load_G = np.zeros(self.cluster.G)
        if self.terms is not None:
            expert, exchange = quota_time(quota_SR, plan.gpu_R, self.terms, self.cluster.G, load_G)
            return expert, exchange, load_G
        time = self.costs.layer_seconds(quota_SR, plan)
        load_G += np.bincount(plan.gpu_R, weights=quota_SR.sum(0), minlength=self.cluster.G)
        return time.expert, time.all_to_all, load_G

    def _wait(self, plan: LayerPlan, load_SE: IntArray, clock: float) -> tuple[BoolArray, float]:
        """Copies to use, and how long until every expert with tokens has one."""
        ready_R = self.pool.ready_at(plan)
        usable_R = np.asarray(ready_R <= clock)
        if usable_R.all():
            return usable_R, 0.0
        first_E = np.full(self.spec.E, np.inf)
        np.minimum.at(first_E, plan.expert_R, ready_R)
        until = float(first_E[load_SE.any(0)].max(initial=clock))
        if not np.isfinite(until):
            raise RunFailed(
                f"layer {plan.layer}: GPU memory has no room for any copy of an expert that tokens need; "
                "use more GPUs, fewer extra slots or a smaller KV share"
            )
        return np.asarray(ready_R <= max(clock, until)), max(0.0, until - clock)

    def _plan(self, layer: int, forecast: Forecast, phase: Phase, now: float) -> None:
        previous = self.plans[layer]
        plan = self.runtime.plan(layer, phase, forecast, previous, self.pool.states(previous, now))
        self.pool.provision(layer, plan.expert_R, plan.gpu_R, now)
        self.plans[layer] = plan

    def _forecast(self, layer: int, target: int, work: Work) -> Forecast:
        context = Context(
            router_input_TH=None if work.router_input_TLH is None else work.router_input_TLH[:, layer],
            topk_TK=None if work.topk_TLK is None else work.topk_TLK[:, layer],
            history_E=self.history.share(target),
            last_load_E=self.history.last(target, work.phase),
            tokens=work.tokens,
            phase=work.phase,
            true_load_E=work.load_LSE[target].sum(0),
        )
        forecast: Forecast = self.runtime.predictor.predict(context, layer, target - layer)
        return forecast

    def _from_history(self, layer: int, work: Work) -> Forecast:
        mean_E = self.history.share_or_even(layer) * (work.tokens * self.spec.K)
        return Forecast(mean_E, mean_E.copy(), work.tokens, "history")

    def _replan(self, now: float) -> None:
        """Make new plans when their time has come; switch to them once all their copies are there."""
        if now < self._next_change:
            return
        if self._pending is not None:
            self.plans, self._pending = self._pending, None
            for plan in self.plans:
                self.pool.provision(plan.layer, plan.expert_R, plan.gpu_R, now)
            self._adopt()
            self._next_change = self._planned_at + self.replan_seconds
            return
        self._planned_at = now
        tokens = max(1, round(self.history.mean_tokens or 1))
        self._pending, ready = [], now
        for layer, old in enumerate(self.plans):
            mean_E = self.history.share_or_even(layer) * (tokens * self.spec.K)
            forecast = Forecast(mean_E, mean_E.copy(), tokens, "history")
            new = self.runtime.plan(layer, Phase.MIXED, forecast, old, None, INTERVAL_ITERATIONS)
            self._pending.append(new)
            # both plans' copies are in memory until the switch
            both = np.concatenate([old.expert_R, new.expert_R]), np.concatenate([old.gpu_R, new.gpu_R])
            self.pool.provision(layer, both[0], both[1], now)
            ready = max(ready, float(self.pool.ready_at(new).max()))
        if not np.isfinite(ready):
            raise RunFailed("GPU memory has no room for the new plan's copies beside the old one's")
        self._next_change = ready
