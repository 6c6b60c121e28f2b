"""Cells that serve several models on one set of GPUs."""

from __future__ import annotations

from typing import Any

from moeless.experiments.cells import serving
from moeless.metrics.requests import good_requests
from moeless.simulator.shared import SharedPool


def serve(params: dict[str, Any], needs: list[Any]) -> dict[str, Any]:
    """All models of ``needs`` at once, each with arrivals of its own seed.

    Params: as ``serving.serve``; ``cluster`` is the pool's. Returns, over all tenants, ``requests``, ``good`` ones,
    ``gpu_seconds`` and ``resident`` (GB·s), ``wakes``, ``drains``, ``overflow_gb``, ``mean_ttft_ms`` by
    tenant.
    """
    benches = [serving.prepare({**params, "seed": params["seed"] + place}, [need]) for place, need in enumerate(needs)]
    pool = SharedPool([bench.tenant(costs, policy) for bench, costs, policy in benches])
    pool.to_the_end()
    good, requests, ttft_ms = 0, 0, []
    for tenant, (bench, _, _) in zip(pool.tenants, benches, strict=True):
        times = tenant.run.clocks.times()
        requests += len(times.arrival_N)
        good += good_requests(times, bench.config.objectives)
        ttft_ms.append(1e3 * float(times.ttft_N.mean()))
    return {
        "requests": requests,
        "good": good,
        "gpu_seconds": pool.gpu_seconds,
        "resident": pool.resident_byte_seconds / 1e9,
        "wakes": [tenant.wakes for tenant in pool.tenants],
        "drains": pool.memory.drains,
        "overflow_gb": pool.memory.overflow_bytes / 1e9,
        "mean_ttft_ms": ttft_ms,
    }
