"""How one iteration's MoE layers run: the plans in force, what is warm, what each layer takes.

A stage holds a policy's state between iterations. ``run`` walks the layers of one iteration on the clock: a
forecast made when layer l starts decides layer l + d's copies, their loading begins at that moment, and layer
l + d uses the copies that are warm when it starts. A layer waits only for an expert that has tokens and no warm
copy at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless.contracts import Context, FloatArray, Forecast, IntArray, LayerPlan, Phase
from moeless.costs import kernels
from moeless.costs.nonexpert import NonExpertTime
from moeless.errors import RunFailed
from moeless.serverless import InstancePool
from moeless.simulator.history import LoadHistory
from moeless.simulator.record import LayerStep
from moeless.simulator.routing import balanced_loads
from moeless.simulator.runtime import INTERVAL_ITERATIONS, PolicyRuntime


@dataclass(frozen=True)
class Work:
    """One iteration as the layers see it; the optional arrays are filled where the predictor reads them."""

    load_LSE: IntArray
    phase: Phase
    tokens: int
    topk_TLK: np.ndarray | None = None  # type: ignore[type-arg]
    router_input_TLH: np.ndarray | None = None  # type: ignore[type-arg]


class Stage:
    """A policy at work.

    Args:
        runtime: the policy's parts.
        pool: where its copies live.
        history: loads known so far; the caller adds each iteration's after it ran.
        replan_seconds: how often an ``interval`` planner plans.
    """

    def __init__(self, runtime: PolicyRuntime, pool: InstancePool, history: LoadHistory, replan_seconds: float) -> None:
        self.runtime, self.pool, self.history = runtime, pool, history
        self.replan_seconds = replan_seconds
        self.spec, self.cluster, self.costs = runtime.spec, runtime.cluster, runtime.costs
        self.cadence = runtime.planner.cadence
        self.terms = self.costs.kernel_terms()
        layers = range(self.spec.L)
        self.plans = [runtime.deployment(history.share(layer), layer) for layer in layers]
        self.control_L = np.array([self.costs.control_seconds(runtime.policy, layer) for layer in layers])
        self._misc = self.costs.misc_seconds()
        self._pending: list[LayerPlan] | None = None
        self._pending_ready = 0.0
        self._next_replan = replan_seconds
        pool.deploy(self.plans, 0.0)
        self._adopt()

    def _adopt(self) -> None:
        """Note what follows from the plans until the next change."""
        self._single = all(plan.R == self.spec.E for plan in self.plans)
        self.replicas_L = np.array([plan.R for plan in self.plans], np.int64)
        if self._single:
            gpu_LE = np.empty((self.spec.L, self.spec.E), np.int32)
            for layer, plan in enumerate(self.plans):
                gpu_LE[layer, plan.expert_R] = plan.gpu_R
            self._gpu_LE = gpu_LE

    def run(self, work: Work, now: float, nonexpert: NonExpertTime) -> tuple[LayerStep, float]:
        """Run one iteration that starts at ``now``.

        Returns:
            The layers' times, and when the last of them ended.
        """
        if self.runtime.lossy:
            gpu_E = self._gpu_LE[0]
            even = balanced_loads(work.load_LSE, gpu_E)
            work = Work(even, work.phase, work.tokens)
        if self.cadence == "interval":
            self._replan(now)
        if self.cadence == "iteration":
            return self._run_layers(work, now, nonexpert, planned=True)
        if self._single and self.terms is not None:
            return self._run_single(work, now, nonexpert)
        return self._run_layers(work, now, nonexpert, planned=False)

    def _run_single(self, work: Work, now: float, nonexpert: NonExpertTime) -> tuple[LayerStep, float]:
        assert self.terms is not None
        expert_L, exchange_L, load_LG = kernels.single_copy_times(
            work.load_LSE, self._gpu_LE, self.terms, self.cluster.G
        )
        layers = self.spec.L
        step = LayerStep(
            expert_L=expert_L,
            exchange_L=exchange_L,
            misc_L=np.full(layers, self._misc),
            control_L=self.control_L,
            stall_L=np.zeros(layers),
            load_LG=load_LG,
            replicas_L=self.replicas_L,
            active_L=(work.load_LSE.sum(1) > 0).sum(1),
            warm_L=self.replicas_L,
        )
        return step, now + float(step.total_L.sum()) + layers * nonexpert.per_moe_layer

    def _run_layers(self, work: Work, now: float, nonexpert: NonExpertTime, planned: bool) -> tuple[LayerStep, float]:
        layers, gpus = self.spec.L, self.cluster.G
        expert_L, exchange_L, stall_L = np.zeros((3, layers))
        load_LG = np.zeros((layers, gpus))
        replicas_L, active_L, warm_L = np.zeros((3, layers), np.int64)
        distance = self.runtime.policy.distance
        clock = now
        if planned:
            # layers that nothing precedes by the distance are planned as the iteration starts, from history
            for layer in range(min(distance, layers)):
                self._plan(layer, self._from_history(layer, work), work.phase, clock)
        for layer in range(layers):
            clock += nonexpert.per_moe_layer
            target = layer + distance
            if planned and target < layers:
                self._plan(target, self._forecast(layer, target, work), work.phase, clock)
            plan = self.plans[layer]
            load_SE = work.load_LSE[layer]
            load_E = load_SE.sum(0)
            if planned:
                usable_R, stall_L[layer] = self._wait(plan, load_E, clock)
                warm_L[layer] = int((self.pool.ready_at(plan) <= clock).sum())
            else:
                usable_R = np.ones(plan.R, np.bool_)
                warm_L[layer] = plan.R
            quota_SR = self.runtime.dispatch(load_SE, plan, usable_R)
            expert_L[layer], exchange_L[layer], load_LG[layer] = self._layer_time(quota_SR, plan)
            clock += stall_L[layer] + expert_L[layer] + exchange_L[layer] + self.control_L[layer] + self._misc
            replicas_L[layer] = plan.R
            active_L[layer] = int((quota_SR.sum(0) > 0).sum())
        step = LayerStep(
            expert_L=expert_L,
            exchange_L=exchange_L,
            misc_L=np.full(layers, self._misc),
            control_L=self.control_L,
            stall_L=stall_L,
            load_LG=load_LG,
            replicas_L=replicas_L,
            active_L=active_L,
            warm_L=warm_L,
        )
        return step, clock

    def _layer_time(self, quota_SR: IntArray, plan: LayerPlan) -> tuple[float, float, FloatArray]:
        load_G = np.zeros(self.cluster.G)
        if self.terms is not None:
            expert, exchange = kernels.quota_time(quota_SR, plan.gpu_R, self.terms, self.cluster.G, load_G)
            return expert, exchange, load_G
        time = self.costs.layer_seconds(quota_SR, plan)
        load_G += np.bincount(plan.gpu_R, weights=quota_SR.sum(0), minlength=self.cluster.G)
        return time.expert, time.all_to_all, load_G

    def _wait(self, plan: LayerPlan, load_E: IntArray, clock: float) -> tuple[np.ndarray, float]:  # type: ignore[type-arg]
        """Copies to use, and how long until every expert with tokens has one."""
        ready_R = self.pool.ready_at(plan)
        usable_R = ready_R <= clock
        if usable_R.all():
            return usable_R, 0.0
        first_E = np.full(self.spec.E, np.inf)
        np.minimum.at(first_E, plan.expert_R, ready_R)
        until = float(first_E[load_E > 0].max(initial=clock))
        if not np.isfinite(until):
            raise RunFailed(
                f"layer {plan.layer}: GPU memory has no room for any copy of an expert that tokens need; "
                "use more GPUs, fewer extra slots or a smaller KV share"
            )
        return ready_R <= max(clock, until), max(0.0, until - clock)

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
        share = self.history.share(layer)
        share_E = np.full(self.spec.E, 1.0 / self.spec.E) if share is None else share
        mean_E = share_E * (work.tokens * self.spec.K)
        return Forecast(mean_E, mean_E.copy(), work.tokens, "history")

    def _replan(self, now: float) -> None:
        """Start new plans when their time has come; switch to them once all their copies are there."""
        if self._pending is not None and now >= self._pending_ready:
            self.plans = self._pending
            self._pending = None
            for plan in self.plans:
                self.pool.provision(plan.layer, plan.expert_R, plan.gpu_R, now)
            self._adopt()
        if self._pending is None and now >= self._next_replan:
            self._next_replan = now + self.replan_seconds
            tokens = max(1, round(self.history.mean_tokens or 1))
            self._pending = []
            self._pending_ready = now
            for layer, old in enumerate(self.plans):
                share = self.history.share(layer)
                share_E = np.full(self.spec.E, 1.0 / self.spec.E) if share is None else share
                forecast = Forecast(share_E * tokens * self.spec.K, share_E * tokens * self.spec.K, tokens, "history")
                new = self.runtime.plan(layer, Phase.MIXED, forecast, old, None, INTERVAL_ITERATIONS)
                self._pending.append(new)
                # both plans' copies are in memory until the switch
                both = np.concatenate([old.expert_R, new.expert_R]), np.concatenate([old.gpu_R, new.gpu_R])
                self.pool.provision(layer, both[0], both[1], now)
                self._pending_ready = max(self._pending_ready, float(self.pool.ready_at(new).max()))
            if not np.isfinite(self._pending_ready):
                raise RunFailed("GPU memory has no room for the new plan's copies beside the old one's")
