"""How one iteration's MoE layers run: the plans in force, what is warm, what each layer takes.

A stage holds a policy's state between iterations. ``run`` walks the layers of one iteration on the clock; a layer
uses the copies that are warm when it starts, and waits only for an expert that has tokens and no warm copy at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeless.contracts import BoolArray, FloatArray, Int32Array, IntArray, LayerPlan, Phase
from moeless.costs.nonexpert import NonExpertCosts, NonExpertTime
from moeless.errors import RunFailed
from moeless.placement.dispatch import EVEN, NO_NUMBERS
from moeless.placement.plan_rows import PlanRows, rows_of
from moeless.placement.threads import in_parallel
from moeless.policy import LoadHistory, ResolvedPolicy
from moeless.policy.resolved import INTERVAL_ITERATIONS
from moeless.serverless import InstancePool
from moeless.simulator.failures import Failure, Outage, without_extras
from moeless.simulator.iteration_plans import ComingPlans, IterationPlans
from moeless.simulator.layer_timing import memory, survey, time_layers
from moeless.simulator.layer_walk import CLOCK, FAILED, LATE, NUM_STATE, WAITED, Walk, run_dealt, walk, walk_layers
from moeless.simulator.record import LayerRecord
from moeless.simulator.routing import Replay, SpanColumns, balanced_topk
from moeless.simulator.steady_steps import DISPATCH_WORK, Batch, SteadySteps
from moeless.simulator.tally import NUM_PARTS, START_PART, layer_time, tally_layers
from moeless.simulator.timeline import Timeline
from moeless.simulator.work import Work

#: Steady decode steps that are simulated in one go, at most.
LONGEST_RUN = 4096
#: Why a run ends where no copy of an expert with tokens can be loaded.
NO_ROOM = (
    "layer {layer}: GPU memory has no room for any copy of an expert that tokens need; "
    "use more GPUs, fewer extra slots or fewer running requests"
)
_NO_PLANS = rows_of([])
_NO_LOADS = np.empty((0, 0))


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
        self.outage = Outage(self.cluster.G)
        rule = runtime.planner.dispatch
        # a rule in Python deals where there is a choice; layers without one are dealt as by any other
        self._in_python = rule.deal is None
        self._rule: Any = (EVEN if self._in_python else rule).address
        self._numbers = NO_NUMBERS if self._in_python else runtime.setting.derived(rule.numbers)
        self.control_L = np.array(
            [self.costs.control_seconds(runtime.planner.control, layer) for layer in range(self.spec.L)], np.float64
        )
        self._wanted = runtime.first_plans([history.share(layer) for layer in range(self.spec.L)])
        self._rows = rows_of(self._wanted)
        self._plans: list[LayerPlan] | None = list(self._wanted)
        self._gpu_LE, self._all_N = np.zeros((self.spec.L, self.spec.E), np.int64), np.arange(self.spec.L)
        self.ahead = IterationPlans(runtime, pool, history)
        self._steps = SteadySteps(
            runtime, history, record, self.ahead.reuse.steps, plan_every, self._rule, self._numbers, self.control_L
        )
        self._since_plan = 0
        self._stale = True
        self._pending: list[LayerPlan] | None = None
        self._planned_at = 0.0
        self._next_change = replan_seconds if self.cadence == "interval" else np.inf
        # until when copies are on their way that the plans in force cannot do without
        self._settled_at, self._cause = 0.0, "cold"
        pool.deploy(self._wanted, 0.0)
        self._look()

    @property
    def plans(self) -> Sequence[LayerPlan]:
        """The plan in force of each layer."""
        if self._plans is None:
            self._plans = [self._rows.plan(layer, layer) for layer in range(self.spec.L)]
        return self._plans

    def _put(self, plans: Sequence[LayerPlan]) -> float:
        """Put plans in force, one of each layer; returns when their last copy is warm."""
        self._rows, self._plans = rows_of(plans, self._rows.widest), list(plans)
        return self._look()

    @property
    def wanted(self) -> list[LayerPlan]:
        """What would be in force if every GPU worked."""
        return list(self.plans) if self.cadence == "iteration" else self._wanted

    def _look(self) -> float:
        """Look at the plans once, until the next change; returns when their last copy is warm.

        It is infinity where memory had no room for one.
        """
        self._replicas, several, deciding, ready = survey(self._rows, self.pool.ready_LEG, self._gpu_LE)
        self._dispatch_work = DISPATCH_WORK * several if self.runtime.planner.dispatch.gathers_counts else 0
        self._decides, self._stale = deciding > 0, False
        return float(ready)

    @property
    def _first_gpu_E(self) -> Int32Array:
        """Where the first layer's primaries are, ``[E]``."""
        plan, gpu_E = self.plans[0], np.empty(self.spec.E, np.int32)
        gpu_E[plan.expert_R[plan.primary_R]] = plan.gpu_R[plan.primary_R]
        return gpu_E

    def _settled(self, now: float) -> bool:
        """Whether every copy of the plans in force is warm, and layers can be timed in any order."""
        if self._stale:
            self._settled_at, self._cause = self._look(), "cold"
        if self._in_python and self._decides:
            return False
        return now >= self._settled_at and (self.timeline is None or not self.timeline.watches(now))

    @property
    def _plans_now(self) -> bool:
        """Whether the next iteration is one before whose layers plans are made."""
        return self.cadence == "iteration" and self._since_plan % self.plan_every == 0

    def run(self, work: Work, now: float, other: NonExpertTime) -> float:
        """Run one iteration's layers from ``now`` on; returns when the last of them ended."""
        self._replan(now)
        tokens = (work.replay.topk_TLK, *work.sorted_T)
        if self.runtime.lossy:
            tokens = self._overridden(work)
        coming = self.ahead.make(work, self._rows, now) if self._plans_now else None
        self._since_plan += 1
        part_LX, time_IL = np.zeros((self.spec.L, NUM_PARTS)), np.empty((1, self.spec.L))
        load_LE = np.empty((self.spec.L, self.spec.E), np.int64)
        costs, planned = self.costs.layer_costs, 0 if coming is None else len(coming.layer_N)
        if coming is None and self._settled(now):
            replicas = self._replicas
            self._time(self._all_N, tokens, part_LX, load_LE)
            tally_layers(part_LX, replicas, costs, self.record.tally, time_IL[0])
            end = now + float(time_IL.sum()) + self.spec.L * other.per_moe_layer
        else:
            replicas, timed_L = int(self._rows.count_N.sum()), np.zeros(self.spec.L, np.bool_)
            if planned < self.spec.L and self._settled(now):
                timed_L[:] = True
                if coming is not None:
                    timed_L[coming.layer_N] = False
                self._time(np.flatnonzero(timed_L), tokens, part_LX, load_LE)
            end = self._walk(work, tokens, coming, now, other, timed_L, part_LX, load_LE)
            tally_layers(part_LX, replicas, costs, self.record.tally, time_IL[0])
        work.load_LE = load_LE
        self.record.append(time_IL)
        return end

    def _overridden(self, work: Work) -> tuple[Any, IntArray, IntArray]:
        """The oracle's override: the iteration's tokens with experts dealt evenly, the same in every layer."""
        _, rank_T = work.sorted_T
        topk_TK = balanced_topk(rank_T, self._first_gpu_E, self.cluster.G, self.spec.K)
        topk_TLK = np.ascontiguousarray(np.broadcast_to(topk_TK[:, None], (len(rank_T), self.spec.L, self.spec.K)))
        return topk_TLK, np.arange(len(rank_T)), rank_T

    def _time(self, layer_N: IntArray, tokens: tuple[Any, ...], part_LX: FloatArray, load_LE: IntArray) -> None:
        """Time layers under the plans in force, all copies warm, on as many threads as pay."""
        topk_TLK, row_T, rank_T = tokens

        def some(start: int, stop: int) -> None:
            time_layers(
                start, stop, layer_N, topk_TLK, row_T, rank_T, self._rows, self._gpu_LE, self._rule, self._numbers,
                self.control_L, self.costs.layer_costs, part_LX, load_LE,
            )  # fmt: skip

        in_parallel(some, len(layer_N), self._dispatch_work * len(layer_N) // self.spec.L)

    def _walk(
        self, work: Work, tokens: tuple[Any, ...], coming: ComingPlans | None, now: float, other: NonExpertTime,
        timed_L: BoolArray, part_LX: FloatArray, load_LE: IntArray,
    ) -> float:  # fmt: skip
        """Walk the layers on the clock; returns when the last of them ended."""
        spec, record = self.spec, self.record
        row_L, asked_L = np.full(spec.L, -1), np.full(spec.L, -1)
        rows = _NO_PLANS
        if coming is not None:
            rows = self._reachable(coming)
            row_L[coming.layer_N], asked_L[coming.layer_N] = np.arange(len(coming.layer_N)), coming.asked_N
            if rows.widest > self._rows.widest:
                self._rows = self._rows.widened(rows.widest)
        watched = self.timeline is not None and self.timeline.watches(now)
        state_X = np.zeros(NUM_STATE)
        state_X[CLOCK], state_X[FAILED] = now, -1.0
        cause = "cold" if self._stale or now >= self._settled_at else self._cause
        stall_2, stalled_2 = np.array([record.stalls.get(cause, 0.0), record.stalls["cold"]]), np.zeros(2, np.bool_)
        since_L = np.where(asked_L < 0, now, np.inf)
        w = Walk(
            tokens[0], tokens[1], tokens[2], self._rows, rows, row_L, asked_L, since_L, self.pool.state, self._gpu_LE,
            self.control_L, self.costs.layer_costs, timed_L, part_LX, load_LE,
            np.zeros((spec.L, self.cluster.G)) if watched else _NO_LOADS, state_X, stall_2, stalled_2,
            # one account where the cause is the same
            self._settled_at if cause != "cold" else -np.inf, float(other.per_moe_layer), float(self.ahead.delay),
        )  # fmt: skip
        if self._in_python:
            self._walk_asking(w, work)
        else:
            walk(w, self._rule, self._numbers)
        self._stale, self._plans = True, None
        self.pool.tell_copies()
        for name, seconds, touched in zip((cause, "cold"), stall_2.tolist(), stalled_2.tolist(), strict=True):
            if touched:
                record.stalls[name] = seconds
        if state_X[FAILED] >= 0:
            raise RunFailed(NO_ROOM.format(layer=int(state_X[FAILED])))
        if coming is not None:
            start_L = np.append(part_LX[:, START_PART], state_X[CLOCK] + other.per_moe_layer)
            seconds_L = np.diff(start_L)
            self.ahead.ran(work.phase, seconds_L, int(state_X[LATE]))
        if watched:
            self._show(w, other)
        return float(state_X[CLOCK])

    def _walk_asking(self, w: Walk, work: Work) -> None:
        """Walk, asking a rule in Python for the quotas of each layer that has a choice."""
        gpus, assignments = self.cluster.G, len(w.row_T) * w.topk_TLK.shape[2]
        m, layer = memory(gpus, self.spec.E, self._rows.widest, gpus, assignments), 0
        while (layer := walk_layers(layer, w, self._rule, self._numbers, True, m)) < self.spec.L:
            if w.state_X[FAILED] >= 0:
                return
            plan = self._rows.plan(layer, layer)
            usable_R = self.pool.ready_at(plan) <= w.state_X[CLOCK] + w.state_X[WAITED]
            run_dealt(layer, self.runtime.dispatch(work.load_LSE[layer], plan, usable_R), w, m)
            layer += 1

    def _reachable(self, coming: ComingPlans) -> PlanRows:
        """The coming plans as far as GPUs work."""
        if not self.outage.down:
            return coming.rows
        plans = [coming.rows.plan(row, layer) for row, layer in enumerate(coming.layer_N.tolist())]
        return rows_of([self.outage.evacuate(plan) for plan in plans])

    def _show(self, w: Walk, other: NonExpertTime) -> None:
        """Tell the timeline of an iteration's layers."""
        assert self.timeline is not None
        for layer, start in enumerate(w.part_LX[:, START_PART].tolist()):
            time = layer_time(w.part_LX[layer], w.costs)
            parts = {
                "stall": time.stall,
                "control": time.control,
                "all-to-all": time.all_to_all,
                "experts": time.expert,
            }
            self.timeline.layer(layer, start, other.per_moe_layer, parts, w.load_LG[layer])

    def repeat(
        self, spans: SpanColumns, replay: Replay, steps: int, now: float, deadline: float, other: NonExpertCosts
    ) -> FloatArray:
        """Run up to ``steps`` decode iterations of one batch, each beginning before ``deadline``.

        Returns when each ended, ``[I]``; empty where this stage cannot tell ahead what they do.
        """
        if steps < 2:
            return np.empty(0)
        self._replan(now)
        reuse = self.ahead.reuse
        if self._plans_now:
            assignments = len(spans.request_N) * self.spec.K
            if not (reuse.steps.active and reuse.kept_by_history(self.history.weight_LE, assignments).all()):
                return np.empty(0)
        if not self._settled(now):
            return np.empty(0)
        if self.timeline is not None:
            deadline = min(deadline, self.timeline.next_start(now))
        steps = min(steps, LONGEST_RUN)
        if self.cadence == "iteration" and not reuse.steps.active:
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
        end_I = self._steps.run(
            batch, steps, now, deadline, self._rows, self._gpu_LE, other.terms, self._since_plan, self._dispatch_work
        )
        self._since_plan += len(end_I)
        return end_I

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
        plans = self._there(self._wanted)
        for layer, there in enumerate(plans):
            self.pool.provision(layer, there.expert_R, there.gpu_R, now)
        self._settled_at = self._put(plans)

    def wake(self, now: float) -> None:
        """After the GPUs were given back: load everything again."""
        self.reload("wake", now)

    def reload(self, cause: str, now: float) -> None:
        """Load what GPUs that work lack of the wanted plans; layers that wait for it do so for this cause."""
        self._cause = cause
        self._wanted = self.wanted
        self.ahead.reuse.forget()
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
            self.ahead.reuse.forget()
        if back and loads and self.cadence != "iteration":
            self._restore(now)
        return back
