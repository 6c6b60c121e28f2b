"""Cells that serve a workload in the simulator: one model, one whose domains drift, several on one set of GPUs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from moeless.contracts import Policy
from moeless.experiments.cells import intervals
from moeless.metrics.requests import good_requests, parse_goodput
from moeless.simulator.bench import Bench, BenchConfig
from moeless.simulator.gpu_pool import GpuPool
from moeless.simulator.routing import Replay
from moeless.simulator.serving_loop import serve_pools
from moeless.workloads.lengths import Workload


def _prepare(params: dict[str, Any], needs: list[Any]) -> tuple[Bench, str, Policy]:
    """The benchmark that a cell's parameters describe, its cost model and its policy."""
    options = dict(params)
    policy, costs, planner = Policy.parse(options.pop("policy")), options.pop("costs"), options.pop("planner", {})
    config = BenchConfig(
        trace=Path(needs[0]),
        policies=(policy,),
        costs=(costs,),
        predictors=tuple(Path(need) for need in needs[1:]),
        planner_params={policy.planner: planner} if planner else {},
        objectives=parse_goodput(options.pop("goodput", [])),
        **options,
    )
    return Bench(config), costs, policy


def serve(params: dict[str, Any], needs: list[Any]) -> dict[str, Any]:
    """One policy under one cost model: a result row with intervals.

    Params: ``policy``, ``costs``, and any field of ``BenchConfig`` but the trace and the predictors, which are
    ``needs[0]`` and the rest. Planner parameters are those of the one planner; ``goodput`` holds texts such as
    ``ttft:500``; with ``blocks`` true, one domain follows the other.
    """
    options = dict(params)
    blocks = options.pop("blocks", False)
    bench, costs, policy = _prepare(options, needs)
    if blocks:
        bench.workload = in_blocks(bench.workload)
        bench.replay = Replay(bench.served.topk_TLK, bench.workload, bench.spec.E, bench.cluster.G)
    return intervals.row(bench.run_cell(costs, policy), bench.spec, bench.cluster.G)


def in_blocks(workload: Workload) -> Workload:
    """The same requests at the same moments of arrival, category after category.

    The order inside a category stays. Requests keep their lengths and their rows of the trace.
    """
    requests = workload.requests
    order = sorted(range(len(requests)), key=lambda index: (requests[index].category or "", index))
    made = tuple(
        dataclasses.replace(requests[source], id=place, arrival=requests[place].arrival)
        for place, source in enumerate(order)
    )
    return dataclasses.replace(workload, requests=made, base_N=np.ascontiguousarray(workload.base_N[order]))


def share(params: dict[str, Any], needs: list[Any]) -> dict[str, Any]:
    """All models of ``needs`` at once on one pool of GPUs, each with arrivals of its own seed.

    Params: as in :func:`serve`; ``cluster`` is the pool's. Returns, over all tenants, ``requests``, ``good`` ones,
    ``gpu_seconds`` and ``resident`` (GB·s), ``wakes``, ``drains``, ``overflow_gb``, ``mean_ttft_ms`` by
    tenant.
    """
    benches = [_prepare({**params, "seed": params["seed"] + place}, [need]) for place, need in enumerate(needs)]
    pool = GpuPool([bench.tenant(costs, policy) for bench, costs, policy in benches])
    serve_pools(pool)
    times = [tenant.clocks.times() for tenant in pool.tenants]
    good = (good_requests(one, bench.config.objectives) for one, (bench, _, _) in zip(times, benches, strict=True))
    return {
        "requests": sum(len(one.arrival_N) for one in times),
        "good": sum(good),
        "gpu_seconds": pool.gpu_seconds,
        "resident": pool.resident_byte_seconds / 1e9,
        "wakes": [tenant.wakes for tenant in pool.tenants],
        "drains": pool.memory.drains,
        "overflow_gb": pool.memory.overflow_bytes / 1e9,
        "mean_ttft_ms": [1e3 * float(one.ttft_N.mean()) for one in times],
    }
