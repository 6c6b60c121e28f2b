"""How one iteration's MoE layers run: the plans in force, what is warm, what each layer takes.

A stage holds a policy's state between iterations. ``run`` walks the layers of one iteration on the clock; a layer
uses the copies that are warm when it starts, and waits only for an expert that has tokens and no warm copy at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from moeless.contracts import BoolArray, FloatArray, Int32Array, IntArray, LayerPlan, Phase
from moeless.costs.kernels import quota_time
from moeless.costs.nonexpert import NonExpertCosts, NonExpertTime
from moeless.errors import RunFailed
from moeless.placement import elastic, elastic_ahead
from moeless.placement.dispatch import even_dispatch
from moeless.placement.threads import in_parallel
from moeless.policy import LoadHistory, ResolvedPolicy
from moeless.policy.resolved import INTERVAL_ITERATIONS
from moeless.serverless import InstancePool
from moeless.simulator import kernels
from moeless.simulator.ahead import AheadPlans, Work
from moeless.simulator.decode import Batch, DecodeSteps, dispatch_work
from moeless.simulator.failures import Failure, Outage, without_extras
from moeless.simulator.in_force import PlansInForce
from moeless.simulator.layer_kernels import CHOSEN, EVEN
from moeless.simulator.planned import NO_ROOM, PlannedIterations
from moeless.simulator.record import LayerRecord
from moeless.simulator.routing import Replay, SpanColumns, balanced_loads, balanced_topk
from moeless.simulator.single_kernels import NUM_PARTS, locate
from moeless.simulator.timeline import Timeline

#: Steady decode steps that are simulated in one go, at most.
LONGEST_RUN = 4096


def _dispatch_mode(runtime: ResolvedPolicy) -> tuple[int | None, tuple[float, ...]]:
    """Which compiled dispatch is the planner's own, None where there is none, and what it takes."""
    none = (0.0, 0.0, 0.0, 0.0, 0.0)
    if runtime.planner.dispatch.quotas is even_dispatch:
        return EVEN, none
    if runtime.planner.dispatch.quotas in (elastic.dispatch, elastic_ahead.dispatch):
        rates = elastic.rates_of(runtime.costs)
        fuel = float(elastic.fuel_on(runtime.cluster.num_gpus, runtime.params.fuel))
        return CHOSEN, (rates.a, rates.b, rates.c, float(runtime.params.depth), fuel)
    return None, none


class Stage:
    """A policy at work.

    Args:
        runtime: the policy's parts.
        pool: where its copies live.
        history: loads known so far; the caller adds each iteration's after ``run``, ``repeat`` adds its own.
        record: where layer times go.
        replan_seconds: how often an ``interval`` planner plans.
        plan_every: iterations between the plans of an ``iteration`` planner.
        timeline: where events go, None for nowhere.
    """

    def __init__(
        self,
        runtime: ResolvedPolicy,
        pool: InstancePool,
        history: LoadHistory,
        record: LayerRecord,
        replan_seconds: float,
        plan_every: int = 1,
        timeline: Timeline | None = None,
    ) -> None:
        self.runtime, self.pool, self.history, self.record = runtime, pool, history, record
        self.replan_seconds, self.plan_every, self.timeline = replan_seconds, plan_every, timeline
        self.spec, self.cluster, self.costs = runtime.spec, runtime.cluster, runtime.costs
        self.cadence = runtime.planner.cadence
        self.terms = self.costs.kernel_terms()
        self.outage = Outage(self.cluster.G)
        layers = range(self.spec.L)
        self._wanted = runtime.first_plans([history.share(layer) for layer in layers])
        self.ahead = AheadPlans(runtime, pool, history, PlansInForce(self._wanted, 0), self.outage)
        self.control_L = np.array([self.costs.control_seconds(runtime.planner.control, layer) for layer in layers])
        self._misc = self.costs.misc_seconds()
        self._mode, self._rates = _dispatch_mode(runtime)
        self._steps = DecodeSteps(
            runtime, history, record, self.ahead.keeping.terms, plan_every, self._mode or EVEN, self._rates,
            self.control_L, self._misc,
        )  # fmt: skip
        self._planned: PlannedIterations | None = None
        if self.terms is not None and self._mode is not None:
            self._planned = PlannedIterations(runtime, self.ahead, self._mode, self._rates, self.control_L)
            self.ahead.plans = PlansInForce(self._wanted, self._planned.widest, self._planned.shares)
        self._since_plan = 0
        self._stale = False
        self._pending: list[LayerPlan] | None = None
        self._planned_at = 0.0
        self._next_change = replan_seconds if self.cadence == "interval" else np.inf
        # until when copies are on their way that the plans in force cannot do without
        self._settled_at, self._cause = 0.0, "cold"
        pool.deploy(self.plans, 0.0)
        self._adopt()

    @property
    def plans(self) -> PlansInForce:
        """The plan in force of each layer."""
        return self.ahead.plans

    @property
    def wanted(self) -> list[LayerPlan]:
        """What would be in force if every GPU worked."""
        return list(self.plans) if self.cadence == "iteration" else self._wanted

    def _adopt(self) -> None:
        """Look at the plans once, until the next change."""
        self._rows, self._gpu_LE = self.plans.rows(), np.zeros((self.spec.L, self.spec.E), np.int64)
        locate(self._rows.expert_LR, self._rows.gpu_LR, self._gpu_LE)
        self._dispatch_work = dispatch_work(self._rows, self.spec.E, self._mode)
        self._stale = False

    @property
    def _single(self) -> bool:
        """Whether every expert has one copy."""
        return bool((self.plans.rows().count_L == self.spec.E).all())

    def _last_ready(self) -> float:
        """When the last copy of any plan in force is warm; infinity where memory had no room for one."""
        expert_LR, gpu_LR, _, count_L, *_ = self.plans.rows()
        held_LR = np.arange(expert_LR.shape[1]) < count_L[:, None]
        layer_N = np.repeat(np.arange(self.spec.L), count_L)
        return float(self.pool.ready_LEG[layer_N, expert_LR[held_LR], gpu_LR[held_LR]].max())

    @property
    def _first_gpu_E(self) -> Int32Array:
        """Where the first layer's primaries are, ``[E]``."""
        plan, gpu_E = self.plans[0], np.empty(self.spec.E, np.int32)
        gpu_E[plan.expert_R[plan.primary_R]] = plan.gpu_R[plan.primary_R]
        return gpu_E

    def _compiled(self, now: float, kept_L: BoolArray | None) -> bool:
        """Whether an iteration is one compiled call: known terms, warm plans that stay, no choice of copies."""
        if self.terms is None or (kept_L is not None and not kept_L.all()):
            return False
        if self._mode is None and not self._single:
            return False
        if self._stale:
            self._adopt()
            self._settled_at = self._last_ready()
            self._cause = "cold"
        return now >= self._settled_at and (self.timeline is None or not self.timeline.watches(now))

    @property
    def _plans_now(self) -> bool:
        """Whether the next iteration is one before whose layers plans are made."""
        return self.cadence == "iteration" and self._since_plan % self.plan_every == 0

    def _kept(self, tokens: int) -> BoolArray | None:
        """Layers whose plans the next iteration leaves as they are; None where it plans nothing."""
        if not self._plans_now:
            return None
        return self.ahead.keeping.kept(self.history.weight_LE, tokens * self.spec.K)

    def run(self, work: Work, now: float, other: NonExpertTime) -> float:
        """Run one iteration's layers from ``now`` on; returns when the last of them ended."""
        given_LSE = np.empty((0, 0, 0), np.int64)
        if self.runtime.lossy:
            given_LSE = balanced_loads(work.load_LSE, self._first_gpu_E)
            work = dataclasses.replace(work, given_LSE=given_LSE)
        self._replan(now)
        kept_L = self._kept(work.tokens)
        if not self._compiled(now, kept_L):
            return self._run_layers(work, now, other, kept_L)
        self._since_plan += 1
        time_IL = np.empty((1, self.spec.L))
        part_LX = np.empty((self.spec.L, NUM_PARTS))
        load_LE = np.empty((self.spec.L, self.spec.E), np.int64)
        row_T, rank_T = work.sorted_T

        def some(start: int, stop: int) -> None:
            kernels.time_layers(
                start, stop, given_LSE, work.replay.topk_TLK, row_T, rank_T, self._rows, self._gpu_LE,
                self._mode or EVEN, self._rates, self.terms, self.cluster.G, part_LX, load_LE,
            )  # fmt: skip

        in_parallel(some, self.spec.L, self._dispatch_work)
        kernels.tally_layers(
            part_LX, self._rows, self.spec.E, self._misc, self.control_L, self.record.tally, time_IL[0]
        )
        work.load_LE = load_LE
        self.record.append(time_IL)
        return now + float(time_IL.sum()) + self.spec.L * other.per_moe_layer

    def repeat(
        self, spans: SpanColumns, replay: Replay, steps: int, now: float, deadline: float, other: NonExpertCosts
    ) -> FloatArray:
        """Run up to ``steps`` decode iterations of one batch, each beginning before ``deadline``.

        Returns when each ended, ``[I]``; empty where this stage cannot tell ahead what they do.
        """
        if steps < 2:
            return np.empty(0)
        self._replan(now)
        if not self._compiled(now, self._kept(len(spans.request_N))):
            return np.empty(0)
        if self.timeline is not None:
            deadline = min(deadline, self.timeline.next_start(now))
        steps = min(steps, LONGEST_RUN)
        keep = self.ahead.keeping.terms
        if self.cadence == "iteration" and not keep.active:
            steps = min(steps, self.plan_every - self._since_plan % self.plan_every)
        topk_TLK, row_F, index_N = replay.topk_TLK, replay.row_F, replay.base_N[spans.request_N] + spans.start_N
        if self.runtime.lossy:
            # the override depends on nothing but how many tokens each rank has: every step and layer alike
            size = len(index_N)
            topk_NK = balanced_topk(spans.rank_N, self._first_gpu_E, self.cluster.G, self.spec.K)
            topk_TLK = np.ascontiguousarray(np.broadcast_to(topk_NK[:, None], (size, self.spec.L, self.spec.K)))
            row_F = np.repeat(np.arange(size, dtype=np.uint32), steps)
            index_N = np.arange(size) * steps
        batch = Batch(topk_TLK, row_F, index_N, spans.start_N, spans.rank_N)
        deadline = min(deadline, self._next_change)
        end_I = self._steps.run(batch, steps, now, deadline, self._rows, self._gpu_LE, other.terms, self._since_plan)
        self._since_plan += len(end_I)
        return end_I

    def _run_layers(self, work: Work, now: float, other: NonExpertTime, kept_L: BoolArray | None) -> float:
        planned = kept_L is not None and not kept_L.all()
        self._since_plan += 1
        self._stale = self._stale or planned
        time_IL = np.empty((1, self.spec.L))
        compiled = self._planned if self._unwatched(planned) else None
        if compiled is not None:
            cause = self._cause if now < self._settled_at else "cold"
            none_L = np.ones(self.spec.L, np.bool_)
            clock = compiled.run(
                work, now, other.per_moe_layer, kept_L if kept_L is not None else none_L, self._settled_at, cause,
                self.record, time_IL[0],
            )  # fmt: skip
            self.record.append(time_IL)
            return clock
        clock = now
        if kept_L is not None and planned:
            self.ahead.start_iteration(work, clock, kept_L)
        all_replicas = sum(plan.R for plan in self.plans)
        for layer in range(self.spec.L):
            clock += other.per_moe_layer
            if planned:
                self.ahead.start_layer(layer, work, clock)
            plan, load_SE = self.ahead.in_force(layer, clock), work.load_LSE[layer]
            usable_R, stall, warm = self._wait(plan, load_SE, clock)
            quota_SR = self.runtime.dispatch(load_SE, plan, usable_R)
            expert, exchange, load_G = self._layer_time(quota_SR, plan)
            # primaries alone, and shares fixed ahead, leave nothing to decide: no counts are gathered
            control = float(self.control_L[layer]) if plan.decides else 0.0
            time_IL[0, layer] = kernels.tally_layer(
                self.record.tally,
                expert,
                exchange,
                self._misc,
                control,
                stall,
                kernels.imbalance(load_G),
                plan.R,
                all_replicas,
                int(quota_SR.any(0).sum()),
                warm,
            )
            if self.timeline is not None:
                parts = {"stall": stall, "control": control, "all-to-all": exchange, "experts": expert}
                self.timeline.layer(layer, clock, other.per_moe_layer, parts, load_G)
            clock += time_IL[0, layer]
            if planned:
                self.ahead.layer_ran(layer, work.phase, other.per_moe_layer + float(time_IL[0, layer]))
        self.record.append(time_IL)
        return clock

    def _unwatched(self, planned: bool) -> bool:
        """Whether an iteration's layers may be compiled: nobody looks, and the planner can if it has to."""
        if self._planned is None or self.timeline is not None or self.runtime.lossy:
            return False
        return not planned or (self._planned.plans and not self.outage.down)

    def _layer_time(self, quota_SR: IntArray, plan: LayerPlan) -> tuple[float, float, FloatArray]:
        load_G = np.zeros(self.cluster.G)
        if self.terms is not None:
            expert, exchange = quota_time(quota_SR, plan.gpu_R, self.terms, self.cluster.G, load_G)
            return expert, exchange, load_G
        time = self.costs.layer_seconds(quota_SR, plan)
        load_G += np.bincount(plan.gpu_R, weights=quota_SR.sum(0), minlength=self.cluster.G)
        return time.expert, time.all_to_all, load_G

    def _wait(self, plan: LayerPlan, load_SE: IntArray, clock: float) -> tuple[BoolArray, float, int]:
        """Copies to use, how long until every expert with tokens has one, and how many were warm at once."""
        ready_R = self.pool.ready_at(plan)
        usable_R = np.asarray(ready_R <= clock)
        warm = int(usable_R.sum())
        if warm == plan.R:
            return usable_R, 0.0, warm
        first_E = np.full(self.spec.E, np.inf)
        np.minimum.at(first_E, plan.expert_R, ready_R)
        until = float(first_E[load_SE.any(0)].max(initial=clock))
        if not np.isfinite(until):
            raise RunFailed(NO_ROOM.format(layer=plan.layer))
        stall = max(0.0, until - clock)
        self.record.stalls[self._cause if clock < self._settled_at else "cold"] += stall
        return np.asarray(ready_R <= clock + stall), stall, warm

    def _replan(self, now: float) -> None:
        """Make an interval planner's new plans when their time has come; switch once all their copies are there."""
        if now < self._next_change:
            return
        if self._pending is not None:
            self._wanted, self._pending = self._pending, None
            self._next_change = self._planned_at + self.replan_seconds
            self._restore(now)
            return
        self._planned_at = now
        tokens = max(1, round(self.history.mean_tokens or 1))
        forecasts = [self.runtime.from_share(self.history.share(layer), tokens) for layer in range(self.spec.L)]
        self._pending = self.runtime.plan_all(Phase.MIXED, forecasts, self.plans, INTERVAL_ITERATIONS)
        ready = self.load_beside(self._pending, now)
        if not np.isfinite(ready):
            raise RunFailed("GPU memory has no room for the new plan's copies beside the old one's")
        self._next_change = max(ready, np.nextafter(now, np.inf))

    def load_beside(self, coming: Sequence[LayerPlan], now: float, leaving_G: BoolArray | None = None) -> float:
        """Load what coming plans want, beside those in force until the switch; returns when the last of it is there."""
        ready = now
        for layer, (old, new) in enumerate(zip(self.plans, coming, strict=True)):
            there = self.outage.evacuate(new, leaving_G)
            both = np.concatenate([old.expert_R, there.expert_R]), np.concatenate([old.gpu_R, there.gpu_R])
            self.pool.provision(layer, both[0], both[1], now)
            ready = max(ready, float(self.pool.ready_at(there).max()))
        return ready

    def _restore(self, now: float) -> None:
        """Put the wanted plans in force, as far as GPUs work; layers wait for what has to be loaded."""
        for layer, there in enumerate(self._there(self._wanted)):
            self.pool.provision(layer, there.expert_R, there.gpu_R, now)
            self.plans[layer] = there
        self._adopt()
        self._settled_at = self._last_ready()

    def wake(self, now: float) -> None:
        """After the GPUs were given back: load everything again."""
        self.reload("wake", now)

    def reload(self, cause: str, now: float) -> None:
        """Load what GPUs that work lack of the wanted plans; layers that wait for it do so for this cause."""
        self._cause = cause
        self._wanted = self.wanted
        self.ahead.keeping.forget()
        self._restore(now)

    def waking_bytes_G(self) -> FloatArray:
        """Bytes of the copies on each GPU that :meth:`reload` wants there."""
        return self.pool.bytes_of(self._there(self.wanted))

    def _there(self, plans: Sequence[LayerPlan]) -> list[LayerPlan]:
        """Plans as far as GPUs work, without extras where memory has no room for all copies of these."""
        there = [self.outage.evacuate(plan) for plan in plans]
        if not self.outage.down or (self.pool.bytes_of(there) <= self.pool.capacity_G).all():
            return there
        return [without_extras(plan) for plan in there]

    def leave(self, leaving_G: BoolArray, now: float) -> None:
        """Do without these GPUs from ``now`` on."""
        for gpu in np.flatnonzero(leaving_G).tolist():
            self.outage.lose(gpu, np.inf)
            self.pool.set_down(gpu, True)
        self.pool.drop(np.broadcast_to(leaving_G, self.pool.born_LEG.shape), now)

    def fail(self, failure: Failure, now: float) -> None:
        """Lose a copy or a GPU at ``now``."""
        lost_LEG = np.zeros(self.pool.born_LEG.shape, np.bool_)
        if failure.layer is not None:
            lost_LEG[failure.layer, failure.expert, failure.gpu] = True
        else:
            lost_LEG[:, :, failure.gpu] = True
            self.outage.lose(failure.gpu, now + failure.restart_seconds)
            self.pool.set_down(failure.gpu, True)
        self.pool.drop(lost_LEG, now)

    def gpus_back(self, now: float, loads: bool = True) -> Sequence[int]:
        """Use GPUs again that have restarted; returns them."""
        back = self.outage.returned(now)
        for gpu in back:
            self.pool.set_down(gpu, False)
        if back:
            self.ahead.keeping.forget()
        if back and loads and self.cadence != "iteration":
            self._restore(now)
        return back
