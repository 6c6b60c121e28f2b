"""The simulation loop: the scheduler's iterations, one after the other, on a simulated clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from moeless.contracts import FloatArray, Iteration, Request
from moeless.costs.nonexpert import NonExpertCosts
from moeless.errors import RunFailed, UserError
from moeless.metrics.billing import Meter
from moeless.metrics.requests import Objective, request_metrics
from moeless.metrics.result import Cell, Evidence
from moeless.serverless import InstancePool, PoolSettings
from moeless.simulator.clocks import RequestClocks
from moeless.simulator.history import LoadHistory
from moeless.simulator.record import LayerRecord, LayerStep
from moeless.simulator.routing import Replay, columns, past_sums
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
    history = LoadHistory(prior_share_LE, spec.K)
    stage = Stage(runtime, pool, history, settings.replan_seconds)
    nonexpert = NonExpertCosts(spec, cluster)
    record, clocks, meter = LayerRecord(spec.L), RequestClocks(requests), Meter()
    reads_tokens = runtime.predictor is not None and stage.cadence == "iteration"
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
        spans = columns(iteration)
        load_LSE = replay.loads(spans)
        rows = replay.rows(spans) if reads_tokens else None
        work = Work(
            load_LSE,
            iteration.phase,
            iteration.tokens,
            None if rows is None else replay.topk_TLK[rows],
            None if rows is None or router_inputs is None else router_inputs(rows),
        )
        other = nonexpert.seconds(*past_sums(spans, cluster.G))
        step, end = stage.run(work, now, other)
        end += other.once
        if iterations >= settings.warmup_iterations:
            record.add(step)
        record.stalls["cold"] += float(step.stall_L.sum())
        _meter(meter, step, spec.expert_bytes, spec.non_expert_bytes * cluster.G)
        history.add(load_LSE.sum(1), iteration.phase, iteration.tokens)
        busy += end - now
        now = end
        clocks.complete(spans, now)
        scheduler.complete(iteration, now)
        iterations += 1
        if progress is not None and iterations % 50 == 0:
            progress(clocks.completed)
    clocks.check()
    meter.gpu_seconds = cluster.G * now
    meter.resident_byte_seconds = pool.resident_byte_seconds(now)
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


def _meter(meter: Meter, step: LayerStep, expert_bytes: int, misc_bytes: float) -> None:
    total_L = step.total_L
    meter.own_layer_byte_seconds += float(np.dot(total_L, step.replicas_L)) * expert_bytes
    meter.whole_byte_seconds += float(total_L.sum()) * float(step.replicas_L.sum()) * expert_bytes
    meter.misc_byte_seconds += float(step.misc_L.sum()) * misc_bytes
