"""The simulation loop: the scheduler's iterations, one after the other, on a simulated clock."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from moeless.contracts import FloatArray, IntArray, Iteration, Phase, Request
from moeless.costs.nonexpert import NonExpertCosts
from moeless.errors import RunFailed
from moeless.policy import LoadHistory, ResolvedPolicy
from moeless.serverless import InstancePool
from moeless.simulator.clocks import RequestClocks
from moeless.simulator.failures import Failure, check_failures
from moeless.simulator.record import LayerRecord
from moeless.simulator.routing import Replay, SpanColumns, columns, rank_sums
from moeless.simulator.scaling import Member, Scaling
from moeless.simulator.stage import Stage
from moeless.simulator.timeline import Timeline
from moeless.simulator.work import Work

if TYPE_CHECKING:
    from moeless.simulator.core import SimulationSettings

#: Tokens of one iteration that computes lost KV caches again.
RECOVERY_TOKENS = 8192


class SchedulerLike(Protocol):
    """What the simulator asks of a scheduler; the clock is the simulator's."""

    def next(self, now: float) -> Iteration | None: ...
    def complete(self, iteration: Iteration, now: float) -> None: ...
    def next_arrival(self, now: float) -> float | None: ...


class Caches(NamedTuple):
    """Requests' KV caches: how many positions each has, and on which GPU."""

    request_N: IntArray
    position_N: IntArray
    owner_N: IntArray


class Run:
    """One workload under one policy, from the first arrival to the last token.

    Attributes:
        now: seconds since the workload's start.
        busy: seconds in which an iteration ran.
        until: when steady decode steps must stop repeating, at the latest, for a reason outside this run.
    """

    def __init__(
        self,
        replay: Replay,
        requests: Sequence[Request],
        scheduler: SchedulerLike,
        runtime: ResolvedPolicy,
        settings: SimulationSettings,
        prior_share_LE: FloatArray | None,
        router_inputs: Callable[[Any], Any] | None,
        timeline: Timeline | None,
    ) -> None:
        self.replay, self.scheduler, self.runtime, self.timeline = replay, scheduler, runtime, timeline
        self.spec, self.cluster = runtime.spec, runtime.cluster
        self.pool = InstancePool(self.spec, self.cluster, runtime.costs, settings.pool)
        self.history = LoadHistory(prior_share_LE, self.spec.L, self.spec.E, self.spec.K)
        self.record, self.clocks = LayerRecord(self.spec.L), RequestClocks(requests)
        self.stage = Stage(
            runtime, self.pool, self.history, self.record, settings.replan_seconds, settings.plan_every, timeline
        )
        self.scaling: Scaling | None = None
        if settings.pool.requests_per_gpu is not None:
            slots = int(runtime.budget.slots_G.max()) - -(-self.spec.E // self.cluster.G)
            self.scaling = Scaling([Member(self.stage, self.pool, max(0, slots))])
        self._held_iterations = 0
        self.nonexpert = NonExpertCosts(self.spec, self.cluster)
        self._warmup = settings.warmup_iterations
        self._failures = check_failures(settings.failures, self.cluster.G)
        self._reads = runtime.predictor.reads if self.stage.cadence == "iteration" else "nothing"
        self._router_inputs = router_inputs
        self._ranks: Any = {}
        self.now, self.busy, self._idle, self._iterations = 0.0, 0.0, 0.0, 0
        self._lost, self._missed = 0, 0
        self.until = math.inf
        if timeline is not None:
            self.pool.on_copy = timeline.copy

    def to_the_end(self, progress: Callable[[int], None] | None = None) -> None:
        """Serve every request, then check that tokens, memory and time were conserved."""
        while True:
            self._happen()
            iteration = self.scheduler.next(self.now)
            if iteration is None:
                arrival = self.scheduler.next_arrival(self.now)
                if arrival is None:
                    break
                if arrival <= self.now:
                    raise RunFailed("the scheduler has work that it never starts")
                self._idle_until(arrival)
                continue
            self.serve(iteration)
            if progress is not None:
                progress(self.clocks.completed)
        self.clocks.check()
        self.pool.check()
        assert math.isclose(self.now, self.busy + self._idle, rel_tol=1e-9, abs_tol=1e-9), "time was lost"

    @property
    def warming_up(self) -> bool:
        """Whether the record is still of the first iterations, which layer figures leave out."""
        return self._iterations <= self._warmup and self._warmup > 0

    def serve(self, iteration: Iteration) -> None:
        """Run one iteration from ``now`` on, and the decode steps like it that may follow at once."""
        if self._iterations == self._warmup:
            self.record.restart()
        spans, begin, before = columns(iteration), self.now, self._iterations
        self._ranks = iteration.rank_of_request
        outage = self.stage.outage
        owner_N = outage.owners(spans.rank_N, spans.request_N, spans.start_N == 0)
        assert not outage.down_G[owner_N].any(), "a request runs on a GPU that is not there"
        spans = dataclasses.replace(spans, rank_N=owner_N)
        sums_SX = rank_sums(spans, self.cluster.G)
        self.pool.share_memory(sums_SX[:, 2] * self.spec.kv_bytes_per_token, begin)
        steady = getattr(self.scheduler, "steady", None)
        steps, deadline = (1, math.inf) if steady is None or self._iterations < self._warmup else steady()
        end_I = self.stage.repeat(spans, self.replay, steps, begin, min(deadline, self._next_event()), self.nonexpert)
        if len(end_I):
            self.clocks.repeat(spans, end_I)
            self.scheduler.skip(len(end_I) - 1)  # type: ignore[attr-defined]
            self._iterations += len(end_I)
            self.now = float(end_I[-1])
        else:
            self._compute(spans, iteration.phase, iteration.tokens, sums_SX)
            self.clocks.complete(spans, self.now)
            self._iterations += 1
        self.busy += self.now - begin
        self._held_iterations += (self._iterations - before) * int(self.pool.held_G.sum())
        self.scheduler.complete(iteration, self.now)

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

    def _idle_until(self, arrival: float) -> None:
        """Let time pass without requests; what breaks meanwhile breaks then, unless the GPU was given back before."""
        idle_from, keep = self.now, self.pool.settings.keep_alive.seconds
        gone = idle_from + keep if self.pool.gives_back else math.inf
        while (moment := self._next_change()) < min(arrival, gone):
            self._wait_until(moment)
            self._happen(arrival)
        asleep = self.pool.sleep(max(idle_from, self.now - keep), arrival)
        if asleep:
            while self._failures and self._failures[0].seconds <= arrival:
                self._failures.pop(0)
                self._missed += 1
            # lost GPUs are not taken again, but others
            self.stage.gpus_back(math.inf, loads=False)
        self._wait_until(arrival)
        if asleep:
            if self.scaling is not None:
                self.scaling.wake(self.now, self._demand())
            self._pause(self.pool.wake_seconds, "container")
            self.stage.wake(self.now)

    def _wait_until(self, moment: float) -> None:
        self._idle += max(0.0, moment - self.now)
        self.now = max(self.now, moment)

    def _pause(self, seconds: float, cause: str, waits_from: float = -math.inf) -> None:
        """Nothing runs; requests wait from ``waits_from`` on."""
        self._idle += seconds
        self.now += seconds
        self.waited(cause, seconds, self.now, waits_from)

    def waited(self, cause: str, seconds: float, until: float, waits_from: float) -> None:
        """Book the last ``seconds`` before ``until`` on a cause, as far as requests waited."""
        self.record.stalls[cause] += min(seconds, max(0.0, until - waits_from))

    def _next_change(self) -> float:
        """When something breaks, or GPUs are to be given back."""
        failure = self._failures[0].seconds if self._failures else math.inf
        return failure if self.scaling is None else min(failure, self.scaling.next_event)

    def _next_event(self) -> float:
        return min(self._next_change(), self.stage.outage.next_return, self.until)

    def _demand(self) -> int:
        """Requests that run or wait."""
        self.scheduler.next_arrival(self.now)
        return int(getattr(self.scheduler, "num_running", 0)) + int(getattr(self.scheduler, "num_waiting", 0))

    @property
    def mean_held(self) -> float:
        """GPUs held in an iteration, on average."""
        return self._held_iterations / self._iterations if self._iterations else float(self.cluster.G)

    def cached(self) -> Caches:
        """Every request's KV cache and the GPU that it is on."""
        request_N, position_N = self.clocks.cached()
        owner_N = np.array([self._ranks[r] for r in request_N.tolist()], np.int64)
        return Caches(request_N, position_N, self.stage.outage.owners(owner_N, request_N))

    def kv_bytes_G(self) -> FloatArray:
        """What the requests' KV caches take on each GPU, ``[G]``."""
        cached = self.cached()
        held_G = np.bincount(cached.owner_N, weights=cached.position_N, minlength=self.cluster.G)
        return np.asarray(held_G * float(self.spec.kv_bytes_per_token))

    def _happen(self, waits_from: float = -math.inf) -> None:
        """Let failures and returns whose time has come take effect; requests wait from ``waits_from`` on."""
        self.stage.gpus_back(self.now)
        while self._failures and self._failures[0].seconds <= self.now:
            failure = self._failures.pop(0)
            if not self.pool.held_G[failure.gpu]:
                self._missed += 1
                continue
            self._pause(failure.detection_seconds, "failure", waits_from)
            if self.scaling is not None and failure.layer is None:
                self._replace(self.scaling, failure, waits_from)
            caches = self.lose(failure)
            if self.scaling is not None and failure.layer is None:
                self.scaling.lost(failure.gpu, self.now, failure.seconds + failure.restart_seconds)
            self.recover(caches)
        if self.scaling is not None:
            self.scaling.adapt(self.now, self._demand(), self.kv_bytes_G())

    def _replace(self, scaling: Scaling, failure: Failure, waits_from: float) -> None:
        """Where too few GPUs are left without the lost one, serving waits for others."""
        there = scaling.replace(failure.gpu, float(self.kv_bytes_G().sum()), self.now)
        if there > self.now:
            self._pause(there - self.now, "container", waits_from)
            self.stage.gpus_back(there)

    def hand_over(self) -> tuple[list[Failure], Scaling | None]:
        """What is to break, and who gives GPUs back, for whoever has the clock of several runs; this run forgets it."""
        failures, scaling = self._failures, self.scaling
        self._failures, self.scaling = [], None
        return failures, scaling

    def lose(self, failure: Failure, loads: bool = True) -> Caches:
        """Lose a copy or a GPU at ``now``; where ``loads``, stand-ins of the copies begin to load.

        Returns:
            The requests whose KV cache went with it, to be given to :meth:`recover`.
        """
        cached = self.cached()
        self.stage.fail(failure, self.now)
        if loads:
            self.stage.reload("failure", self.now)
        lost_N = (cached.owner_N == failure.gpu) & (failure.layer is None)
        return Caches(*(column_N[lost_N] for column_N in cached))

    def recover(self, lost: Caches) -> None:
        """Compute lost KV caches again on the GPUs that are left; no request gets a token from it."""
        if not len(lost.request_N):
            return
        self._lost += len(lost.request_N)
        owner_N = self.stage.outage.owners(lost.owner_N, lost.request_N)
        begin, place_N = self.now, zip(lost.request_N.tolist(), lost.position_N.tolist(), owner_N.tolist(), strict=True)
        for request, upto, owner in place_N:
            for start in range(0, upto, RECOVERY_TOKENS):
                stop = min(upto, start + RECOVERY_TOKENS)
                one = np.ones(1, np.int64)
                spans = SpanColumns(request * one, start * one, stop * one, one > 0, owner * one)
                self._compute(spans, Phase.PREFILL, stop - start, rank_sums(spans, self.cluster.G))
        self.record.stalls["recovery"] += self.now - begin
        self.busy += self.now - begin

    def remarks(self) -> list[str]:
        """What happened in memory and with plans that a reader should know."""
        said: list[str] = []
        if self.pool.refused:
            said.append(f"memory had no room for {self.pool.refused} planned copies")
        if self.pool.kv_overflow_bytes > 0:
            said.append(
                f"experts and KV cache exceeded a GPU's memory by up to {self.pool.kv_overflow_bytes / 1e9:.1f} GB: "
                "a real system would preempt requests"
            )
        ahead = self.stage.ahead
        if ahead.made and ahead.late:
            said.append(f"{100 * ahead.late / ahead.made:.1f} % of the plans came after their layer had started")
        if self._missed:
            said.append(f"losses of GPUs that had been given back: {self._missed}; they changed nothing")
        if self._lost:
            said.append(f"{self._lost} requests lost their KV cache with a GPU and were computed again")
        return said
