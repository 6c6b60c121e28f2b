"""One model with its workload on a pool's GPUs: its iterations, its requests' KV caches, the memory that it takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moeless.contracts import BoolArray, FloatArray, IntArray, Phase, Request
from moeless.costs.nonexpert import NonExpertCosts
from moeless.errors import RunFailed
from moeless.policy import LoadHistory, ResolvedPolicy
from moeless.serverless import InstancePool
from moeless.simulator.events import Event, Kind
from moeless.simulator.failures import Failure, check_failures
from moeless.simulator.record import LayerRecord
from moeless.simulator.request_clocks import RequestClocks
from moeless.simulator.routing import Replay, SpanColumns, columns, rank_sums
from moeless.simulator.settings import SimulationSettings
from moeless.simulator.stage import Stage
from moeless.simulator.timeline import Timeline
from moeless.simulator.work import Work
from moeless.workloads.scheduler import Scheduler

#: Tokens of one iteration that computes lost KV caches again.
RECOVERY_TOKENS = 8192


class Tenant:
    """One model and its workload under one policy.

    A tenant is *asleep* while its weights are in no GPU memory.

    Attributes:
        now: until when it has been simulated, in seconds since the workload's start.
        busy: seconds in which an iteration ran.
        awake: its weights are in memory or on their way.
        ready: when it may run iterations.
        used: when its last iteration ended.
        wakes: how often it was woken.
        need_G: memory that it takes once it is woken, ``[G]``; up to date while it sleeps.
        wanted: since when it has asked for memory that it does not get; infinity where it does not.
        owed: running requests whose KV caches were lost, or given up, and are to be computed again before anything else
            of it runs.
        missed: losses of GPUs that had been given back.
        arrival, loaded, expired: its next request's arrival, while it has no work; its weights' loading; the end of its
            keep-alive. Set by the pool that it joins.
    """

    arrival: Event
    loaded: Event
    expired: Event

    def __init__(
        self,
        replay: Replay,
        requests: Sequence[Request],
        scheduler: Scheduler,
        runtime: ResolvedPolicy,
        settings: SimulationSettings,
        prior_share_LE: FloatArray | None,
        router_inputs: Callable[[Any], Any] | None,
        timeline: Timeline | None,
    ) -> None:
        self.replay, self.scheduler, self.runtime, self.timeline = replay, scheduler, runtime, timeline
        self.spec, self.cluster = runtime.spec, runtime.cluster
        self.instances = InstancePool(self.spec, self.cluster, runtime.costs, settings.pool)
        self.history = LoadHistory(prior_share_LE, self.spec.L, self.spec.E, self.spec.K)
        self.record, self.clocks = LayerRecord(self.spec.L), RequestClocks(requests)
        self.stage = Stage(
            runtime, self.instances, self.history, self.record, settings.replan_seconds, settings.plan_every, timeline
        )
        self.nonexpert = NonExpertCosts(self.spec, self.cluster)
        self.failures = check_failures(settings.failures, self.cluster.G)
        extras = int(runtime.budget.slots_G.max()) - -(-self.spec.E // self.cluster.G)
        self._extra_slots, self._warmup = max(0, extras), settings.warmup_iterations
        self._reads = runtime.predictor.reads if self.stage.cadence == "iteration" else "nothing"
        self._router_inputs = router_inputs
        self._ranks: Any = {}
        self.now, self.busy, self._iterations, self._held_iterations = 0.0, 0.0, 0, 0
        self.awake, self.ready, self.used, self.wakes = True, 0.0, 0.0, 0
        self.need_G, self.wanted = self.bytes_G, math.inf
        # a dictionary for its order
        self.owed: dict[int, None] = {}
        self._recovered, self.missed = 0, 0
        if timeline is not None:
            self.instances.on_copy = timeline.copy

    def join(self, event: Callable[[Kind, Tenant], Event]) -> None:
        """Have its own events, made by the pool that it belongs to."""
        self.arrival, self.loaded = event(Kind.ARRIVAL, self), event(Kind.WEIGHTS_LOADED, self)
        self.expired = event(Kind.MODEL_EXPIRED, self)

    def demand(self, now: float) -> int:
        """Requests of it that run or wait."""
        self.scheduler.next_arrival(now)
        return self.scheduler.num_running + self.scheduler.num_waiting

    def has_work(self, now: float) -> bool:
        """Whether a request of it runs or waits."""
        arrival = self.scheduler.next_arrival(now)
        return self.scheduler.num_running + self.scheduler.num_waiting > 0 or (arrival is not None and arrival <= now)

    @property
    def idle_from(self) -> float:
        """Since when an awake tenant without work has had none."""
        return max(self.used, self.ready)

    def may_sleep(self, now: float) -> bool:
        """Whether it holds memory that nothing of it needs at the moment, or that it has to give up."""
        if self.ready > now:
            return False
        return not self.scheduler.num_running if self.scheduler.draining else not self.has_work(now)

    def needs_room(self, now: float) -> bool:
        """Whether GPUs have to be held for its weights: it has work, or stays in memory without."""
        return self.has_work(now) or (self.awake and (not self.instances.gives_back or self.ready > now))

    @property
    def bytes_G(self) -> FloatArray:
        """Memory that it takes while awake: weights, and the KV cache of its running requests."""
        return self.instances.resident_G + self._other_bytes_G

    def firm_bytes_G(self, now: float) -> FloatArray:
        """The same without copies that no plan holds, which may go at any time."""
        return self.instances.firm_G(now) + self._other_bytes_G

    @property
    def _other_bytes_G(self) -> FloatArray:
        instances = self.instances
        kv_bytes_G = (instances.room_G - instances.capacity_G) * (self.scheduler.num_running > 0)
        return np.asarray(float(self.spec.non_expert_bytes) + kv_bytes_G)

    @property
    def waking_bytes_G(self) -> FloatArray:
        """Memory that it takes once it is woken, ``[G]``."""
        return self.stage.waking_bytes_G() + float(self.spec.non_expert_bytes)

    def even_bytes(self, gpus: int) -> float:
        """Bytes of its copies on one of so many GPUs, evenly laid out, with the extras of a plan."""
        return self.spec.L * (-(-self.spec.E // gpus) + self._extra_slots) * float(self.spec.expert_bytes)

    def bytes_without(self, leaving_G: BoolArray) -> FloatArray:
        """Bytes that it takes on each GPU once it has left some."""
        instances = self.instances
        plans = [self.stage.outage.evacuate(plan, leaving_G) for plan in self.stage.plans]
        kv_bytes_G = instances.room_G - instances.capacity_G
        return instances.bytes_of(plans) + float(self.spec.non_expert_bytes) + kv_bytes_G

    @property
    def all_loaded(self) -> float:
        """When the last copy of its plans is warm.

        Raises:
            RunFailed: memory had no room for one.
        """
        ready = max(float(self.instances.ready_at(plan).max()) for plan in self.stage.plans)
        if not math.isfinite(ready):
            raise RunFailed(f"GPU memory has no room for the plans of {self.spec.name}")
        return ready

    @property
    def warming_up(self) -> bool:
        """Whether the record is still of the first iterations, which layer figures leave out."""
        return self._iterations <= self._warmup and self._warmup > 0

    @property
    def mean_held(self) -> float:
        """GPUs held in an iteration, on average."""
        return self._held_iterations / self._iterations if self._iterations else float(self.cluster.G)

    def serve(self, now: float, deadline: float) -> float:
        """Run the next iteration from ``now`` on, and the decode steps like it that begin before ``deadline``.

        Returns:
            When the last of them ended.
        """
        self.now, iteration = now, self.scheduler.next(now)
        if iteration is None:
            raise RunFailed("the scheduler has work that it never starts")
        if self._iterations == self._warmup:
            self.record.restart()
        spans, before = columns(iteration), self._iterations
        self._ranks = iteration.rank_of_request
        outage = self.stage.outage
        owner_N = outage.owners(spans.rank_N, spans.request_N, spans.start_N == 0)
        assert not np.count_nonzero(outage.down_G[owner_N]), "a request runs on a GPU that is not there"
        if owner_N is not spans.rank_N:
            spans = dataclasses.replace(spans, rank_N=owner_N)
        sums_SX = rank_sums(spans, self.cluster.G)
        self.instances.share_memory(sums_SX[:, 2] * self.spec.kv_bytes_per_token, now)
        steps, steady_until = (1, math.inf) if self._iterations < self._warmup else self.scheduler.steady()
        end_I = self.stage.repeat(spans, self.replay, steps, now, min(steady_until, deadline), self.nonexpert)
        if len(end_I):
            self.clocks.repeat(spans, end_I)
            self.scheduler.skip(len(end_I) - 1)
            self._iterations += len(end_I)
            self.now = float(end_I[-1])
        else:
            self._compute(spans, iteration.phase, iteration.tokens, sums_SX)
            self.clocks.complete(spans, self.now)
            self._iterations += 1
        self.busy += self.now - now
        self._held_iterations += (self._iterations - before) * int(np.count_nonzero(self.instances.held_G))
        self.scheduler.complete(iteration, self.now)
        self.used = self.now
        return self.now

    def _compute(self, spans: SpanColumns, phase: Phase, tokens: int, sums_SX: FloatArray) -> None:
        """Run one iteration and move the clock to its end."""
        rows = self.replay.rows(spans) if self._reads in ("topk", "router_inputs") else None
        inputs = None
        if rows is not None and self._reads == "router_inputs" and self._router_inputs is not None:
            inputs = self._router_inputs(rows)
        topk_TLK = None if rows is None else self.replay.topk_TLK[rows]
        work = Work(self.replay, spans, phase, tokens, topk_TLK, inputs)
        if rows is not None and self.replay.token_T is not None:
            work.token_T = self.replay.token_T[rows]
        other = self.nonexpert.seconds(sums_SX)
        begin = self.now
        self.now = self.stage.run(work, begin, other) + other.once
        self.history.add(work.load_LE, phase, tokens)
        if self.timeline is not None:
            self.timeline.iteration(self._iterations, work, begin, self.now)

    def waited(self, cause: str, begin: float, seconds: float) -> None:
        """Book an interruption of the pool on a cause, as far as a request of this model waits meanwhile."""
        if not self.has_work(begin):
            arrival = self.scheduler.next_arrival(begin)
            seconds = 0.0 if arrival is None else min(seconds, max(0.0, begin + seconds - arrival))
        self.record.stalls[cause] += seconds

    def cached(self) -> tuple[IntArray, IntArray, IntArray]:
        """Requests with a KV cache, how many positions each has there, and on which GPU."""
        request_N, position_N = self.clocks.cached()
        owner_N = np.array([self._ranks[r] for r in request_N.tolist()], np.int64)
        return request_N, position_N, self.stage.outage.owners(owner_N, request_N)

    def kv_bytes_G(self) -> FloatArray:
        """What the requests' KV caches take on each GPU, ``[G]``."""
        _, position_N, owner_N = self.cached()
        held_G = np.bincount(owner_N, weights=position_N, minlength=self.cluster.G)
        return np.asarray(held_G * float(self.spec.kv_bytes_per_token))

    def lose(self, failure: Failure, now: float) -> None:
        """Lose a copy, or a GPU with the copies and KV caches on it."""
        self.now = now
        request_N, _, owner_N = self.cached()
        if failure.layer is None:
            self.owed |= dict.fromkeys(request_N[owner_N == failure.gpu].tolist())
        self.stage.fail(failure, now)

    def recover(self, now: float) -> float:
        """Compute lost KV caches again on the GPUs that are left; no request gets a token from it.

        Returns:
            When that ended.
        """
        self.now, self._recovered = now, self._recovered + len(self.owed)
        request_N, position_N, owner_N = self.cached()
        for place in np.searchsorted(request_N, list(self.owed)):
            one, upto = np.ones(1, np.int64), int(position_N[place])
            for start in range(0, upto, RECOVERY_TOKENS):
                stop = min(upto, start + RECOVERY_TOKENS)
                spans = SpanColumns(request_N[place] * one, start * one, stop * one, one > 0, owner_N[place] * one)
                self._compute(spans, Phase.PREFILL, stop - start, rank_sums(spans, self.cluster.G))
        self.owed = {}
        self.record.stalls["recovery"] += self.now - now
        self.busy += self.now - now
        return self.now

    def remarks(self) -> list[str]:
        """What happened in memory and with plans that a reader should know."""
        said: list[str] = []
        if self.instances.refused:
            said.append(f"memory had no room for {self.instances.refused} planned copies")
        if self.instances.kv_overflow_bytes > 0:
            said.append(
                f"experts and KV cache exceeded a GPU's memory by up to {self.instances.kv_overflow_bytes / 1e9:.1f} "
                "GB: a real system would preempt requests"
            )
        ahead = self.stage.ahead
        if ahead.made and ahead.late:
            said.append(f"{100 * ahead.late / ahead.made:.1f} % of the plans came after their layer had started")
        if self.missed:
            said.append(f"losses of GPUs that had been given back: {self.missed}; they changed nothing")
        if self._recovered:
            said.append(f"{self._recovered} requests lost their KV cache with a GPU and were computed again")
        return said
