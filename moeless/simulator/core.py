"""The simulation loop: the scheduler's iterations, one after the other, on a simulated clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moeless.contracts import FloatArray, Iteration, Request
from moeless.costs.nonexpert import NonExpertCosts
from moeless.errors import RunFailed, UserError
from moeless.metrics.billing import Meter
from moeless.metrics.requests import Objective, request_metrics
from moeless.metrics.result import Cell, Evidence
from moeless.serverless import InstancePool, PoolSettings
from moeless.simulator import kernels
from moeless.simulator.clocks import RequestClocks
from moeless.simulator.history import LoadHistory
from moeless.simulator.record import LayerRecord
from moeless.simulator.routing import Replay, SpanColumns, columns, rank_sums
from moeless.simulator.runtime import PolicyRuntime
from moeless.simulator.stage import Stage, Work
from moeless.simulator.validity import check_validity


class SchedulerLike(Protocol):
    """What the simulator asks of a scheduler; the clock is the simulator's."""

    def next(self, now: float) -> Iteration | None: ...
    def complete(self, iteration: Iteration, now: float) -> None: ...
    def next_arrival(self, now: float) -> float | None: ...


@dataclass(frozen=True)
class SimulationSettings:
    """Assumptions of a simulation.

    Attributes:
        pool: instances, keep-alive, memory.
        replan_seconds: how often an ``interval`` planner (EPLB) plans; the paper's example is ten minutes.
        warmup_iterations: first iterations that layer figures leave out; bills and request figures keep them.
    """

    pool: PoolSettings = field(default_factory=PoolSettings)
    replan_seconds: float = 600.0
    warmup_iterations: int = 0

    def __post_init__(self) -> None:
        if self.replan_seconds <= 0:
            raise UserError("the time between EPLB's plans must be above 0 seconds")
        if self.warmup_iterations < 0:
            raise UserError("the number of warm-up iterations must not be negative")


@dataclass(frozen=True)
class Simulation:
    """A finished run: its result row, and the records behind it."""

    cell: Cell
    record: LayerRecord
    clocks: RequestClocks
    pool: InstancePool
    end: float


def simulate(
    replay: Replay,
    requests: Sequence[Request],
    scheduler: SchedulerLike,
    runtime: PolicyRuntime,
    *,
    settings: SimulationSettings,
    prior_share_LE: FloatArray | None = None,
    objectives: Sequence[Objective] = (),
    evidence: Evidence = "simulated",
    trace_kind: str = "tokens",
    labels: dict[str, Any] | None = None,
    router_inputs: Callable[[Any], Any] | None = None,
    progress: Callable[[int], None] | None = None,
    notes: Sequence[str] = (),
) -> Simulation:
    """Serve a workload under one policy.

    Args:
        replay: routing of the workload's requests.
        scheduler: fresh, over the same requests, with one rank per GPU.
        runtime: the policy with its model, cluster and costs.
        prior_share_LE: load shares known before the run, from data that the workload does not replay.
        objectives: goodput limits.
        labels: settings to name in the result row.
        router_inputs: trace rows ``[T]`` to gate inputs ``[T, L, H]``, for predictors that read them.
        progress: called with the number of completed requests, now and then.
        notes: warnings about the workload, put first among the row's own.

    Raises:
        RunFailed: the model does not fit, or the scheduler stalls.
    """
    spec, cluster = runtime.spec, runtime.cluster
    pool = InstancePool(spec, cluster, runtime.costs, settings.pool)
    history = LoadHistory(prior_share_LE, spec.L, spec.E, spec.K)
    record, clocks = LayerRecord(spec.L), RequestClocks(requests)
    stage = Stage(runtime, pool, history, record, settings.replan_seconds)
    nonexpert = NonExpertCosts(spec, cluster)
    reads_tokens = runtime.predictor is not None and stage.cadence == "iteration"
    steady = getattr(scheduler, "steady", None)
    now, busy, iterations = 0.0, 0.0, 0
    while True:
        iteration = scheduler.next(now)
        if iteration is None:
            arrival = scheduler.next_arrival(now)
            if arrival is None:
                break
            if arrival <= now:
                raise RunFailed("the scheduler has work that it never starts")
            now = arrival
            continue
        if iterations == settings.warmup_iterations:
            record.restart()
        spans = columns(iteration)
        steps, deadline = (1, math.inf) if steady is None or iterations < settings.warmup_iterations else steady()
        end_I = stage.repeat(spans, replay, steps, now, deadline, nonexpert)
        if len(end_I):
            end = float(end_I[-1])
            clocks.repeat(spans, end_I)
            scheduler.skip(len(end_I) - 1)  # type: ignore[attr-defined]
            iterations += len(end_I)
        else:
            end = _one(stage, replay, spans, iteration, nonexpert, now, reads_tokens, router_inputs)
            clocks.complete(spans, end)
            iterations += 1
        busy += end - now
        now = end
        scheduler.complete(iteration, now)
        if progress is not None:
            progress(clocks.completed)
    clocks.check()
    meter = Meter(
        own_layer_byte_seconds=float(record.billed[kernels.OWN]) * spec.expert_bytes,
        whole_byte_seconds=float(record.billed[kernels.WHOLE]) * spec.expert_bytes,
        misc_byte_seconds=float(record.billed[kernels.MISC]) * spec.non_expert_bytes * cluster.G,
        resident_byte_seconds=pool.resident_byte_seconds(now),
        gpu_seconds=cluster.G * now,
    )
    layer = record.metrics(pool.moved_bytes)
    if layer is None:
        raise RunFailed("no iteration was measured: the workload is empty or warm-up took all of it")
    figures = request_metrics(clocks.times(), duration=now, failed=clocks.unfinished, objectives=objectives)
    request, warnings = check_validity(
        figures, scheduler, samples=layer.samples, busy_fraction=busy / now if now > 0 else 1.0
    )
    if runtime.lossy:
        warnings.append("the oracle overrides the router: its outputs differ from the model's")
    if pool.refused:
        warnings.append(f"memory had no room for {pool.refused} planned copies")
    cell = Cell(
        policy=runtime.label,
        predictor=runtime.policy.predictor,
        distance=runtime.policy.distance,
        model=spec.name,
        trace_kind=trace_kind,
        cluster=cluster.name,
        costs=runtime.costs.name,
        evidence=evidence,
        layer=layer,
        request=request,
        billing=meter.bill(cluster),
        warnings=(*notes, *warnings),
        lossy=runtime.lossy,
        settings=labels or {},
    )
    return Simulation(cell, record, clocks, pool, now)


def _one(
    stage: Stage,
    replay: Replay,
    spans: SpanColumns,
    iteration: Iteration,
    nonexpert: NonExpertCosts,
    now: float,
    reads_tokens: bool,
    router_inputs: Callable[[Any], Any] | None,
) -> float:
    """Run one iteration; returns when it ended."""
    load_LSE = replay.loads(spans)
    rows = replay.rows(spans) if reads_tokens else None
    work = Work(
        load_LSE,
        iteration.phase,
        iteration.tokens,
        None if rows is None else replay.topk_TLK[rows],
        None if rows is None or router_inputs is None else router_inputs(rows),
    )
    other = nonexpert.seconds(rank_sums(spans, stage.cluster.G))
    end = stage.run(work, now, other)
    stage.history.add(load_LSE.sum(1), iteration.phase, iteration.tokens)
    return end + other.once
