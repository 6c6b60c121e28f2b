"""The serving loop: every event of every pool, in order of time."""

from __future__ import annotations

from collections.abc import Callable

from moeless.simulator.gpu_pool import GpuPool


def serve_pools(*pools: GpuPool, progress: Callable[[int], None] | None = None) -> None:
    """Serve every request of every tenant, then check that tokens, memory and time were conserved.

    Args:
        pools: fresh, with one queue for all.
        progress: called with the number of completed requests, now and then.

    Raises:
        RunFailed: a scheduler stalls, or the GPUs that are left have no room for a model.
    """
    queue = pools[0].queue
    assert all(pool.queue is queue for pool in pools), "pools of one simulation share its queue"
    while not all(pool.done for pool in pools) and (event := queue.pop()) is not None:
        event.owner.happen(event)
        if progress is not None:
            progress(sum(tenant.clocks.completed for pool in pools for tenant in pool.tenants))
    for pool in pools:
        pool.check()
