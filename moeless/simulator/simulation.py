"""A workload served under one policy, as one row of a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moeless.contracts import FloatArray, Request
from moeless.errors import RunFailed
from moeless.metrics.billing import Meter
from moeless.metrics.requests import Objective, request_metrics
from moeless.metrics.result import Cell, Evidence
from moeless.policy import ResolvedPolicy
from moeless.serverless import InstancePool
from moeless.simulator import tally
from moeless.simulator.gpu_pool import GpuPool
from moeless.simulator.record import LayerRecord
from moeless.simulator.request_clocks import RequestClocks
from moeless.simulator.routing import Replay
from moeless.simulator.serving_loop import serve_pools
from moeless.simulator.settings import SimulationSettings
from moeless.simulator.tenants import Tenant
from moeless.simulator.timeline import Timeline
from moeless.simulator.validity import check_validity
from moeless.workloads.scheduler import Scheduler


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
    scheduler: Scheduler,
    runtime: ResolvedPolicy,
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
    timeline: Timeline | None = None,
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
        timeline: where events of a window go.

    Raises:
        RunFailed: the model does not fit, or the scheduler stalls.
    """
    spec, cluster = runtime.spec, runtime.cluster
    tenant = Tenant(replay, requests, scheduler, runtime, settings, prior_share_LE, router_inputs, timeline)
    pool = GpuPool([tenant])
    serve_pools(pool, progress=progress)
    record, instances, clocks, now = tenant.record, tenant.instances, tenant.clocks, pool.now
    meter = Meter(
        own_layer_byte_seconds=float(record.billed[tally.OWN]) * spec.expert_bytes,
        whole_byte_seconds=float(record.billed[tally.WHOLE]) * spec.expert_bytes,
        misc_byte_seconds=float(record.billed[tally.MISC]) * spec.non_expert_bytes * tenant.mean_held,
        resident_byte_seconds=pool.resident_byte_seconds,
        gpu_seconds=pool.gpu_seconds,
    )
    layer = None if tenant.warming_up else record.metrics(instances.moved_bytes)
    if layer is None:
        raise RunFailed("no iteration was measured: the workload is empty or warm-up took all of it")
    figures = request_metrics(clocks.times(), duration=now, failed=clocks.unfinished, objectives=objectives)
    request, warnings = check_validity(
        figures,
        scheduler,
        samples=layer.samples,
        busy_fraction=tenant.busy / now if now > 0 else 1.0,
        cold_start_seconds=instances.wake_seconds if settings.pool.scale_to_zero else 0.0,
    )
    if runtime.lossy:
        warnings.append("the oracle overrides the router: its outputs differ from the model's")
    warnings += [*tenant.remarks(), *runtime.costs.warnings]
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
    return Simulation(cell, record, clocks, instances, now)
