"""Several models on one set of GPUs: their iterations take turns, their weights share the memory.

A *tenant* is one model with its workload. Each iteration has all GPUs to itself, as in time-sliced serving; tenants
that have work take turns. A tenant is *asleep* while its weights are in no GPU memory. It is woken when work arrives:
where memory is short, tenants without running requests are put to sleep first, least recently used first; where that
is not enough it waits. Loading goes on beside the others' iterations, and all tenants share each GPU's copy engine.

Axes: G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeless.contracts import FloatArray
from moeless.errors import RunFailed, UserError
from moeless.simulator.loop import Run
from moeless.workloads.continuous import Continuous


@dataclass
class Tenant:
    """One model of the pool, over the records of its :class:`Run`.

    Attributes:
        scheduler: the run's own.
        awake: its weights are in memory or on their way.
        ready: when they are all there.
        used: when its last iteration ended.
        wakes: how often it was woken.
    """

    run: Run
    scheduler: Continuous
    awake: bool = True
    ready: float = 0.0
    used: float = 0.0
    wakes: int = 0

    @property
    def bytes_G(self) -> FloatArray:
        """Memory that it takes while awake: weights, and the KV cache of its running requests."""
        pool = self.run.pool
        held_G = pool.resident_G + float(self.run.spec.non_expert_bytes)
        return np.asarray(held_G + (pool.room_G - pool.capacity_G) if self.scheduler.num_running else held_G)

    def has_work(self, now: float) -> bool:
        """Whether a request of it runs or waits."""
        self.scheduler.next_arrival(now)
        return self.scheduler.num_running + self.scheduler.num_waiting > 0


class SharedPool:
    """Tenants on the same GPUs.

    Args:
        runs: fresh, one per tenant, all on the same cluster and with continuous batching.

    Attributes:
        end: when the last token of all tenants came.
        overflow_bytes: most by which a GPU's memory was exceeded while no tenant could leave.

    Raises:
        UserError: no tenant, clusters that differ, or another batching.
        RunFailed: a tenant does not fit into memory even alone.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        if not runs or any(run.cluster != runs[0].cluster for run in runs):
            raise UserError("a shared pool needs at least one tenant, and all tenants on the same cluster")
        self.cluster = runs[0].cluster
        self.tenants = []
        for run in runs:
            if not isinstance(run.scheduler, Continuous):
                raise UserError("tenants of a shared pool are served with continuous batching")
            self.tenants.append(Tenant(run, run.scheduler))
        self.end, self.overflow_bytes = 0.0, 0.0
        engine_free_G = np.zeros(self.cluster.G)
        self._need_G = [tenant.bytes_G for tenant in self.tenants]
        held_G = np.zeros(self.cluster.G)
        for tenant, need_G in zip(self.tenants, self._need_G, strict=True):
            tenant.run.pool.engine_free_G = engine_free_G
            if (need_G > self._memory).any():
                raise RunFailed(
                    f"{tenant.run.spec.name} needs {need_G.max() / 1e9:.1f} GB on a GPU of {self.cluster.name}, which "
                    f"has {self._memory / 1e9:.1f} GB; use more GPUs"
                )
            # whoever fits is there from the start, in the order given
            if (held_G + need_G <= self._memory).all():
                held_G = held_G + need_G
            else:
                self._sleep(tenant, 0.0)

    @property
    def _memory(self) -> float:
        return float(self.cluster.device.memory_bytes)

    @property
    def gpu_seconds(self) -> float:
        """Of all GPUs from 0 to ``end``."""
        return self.cluster.G * self.end

    @property
    def resident_byte_seconds(self) -> float:
        """Of all tenants' expert copies."""
        return sum(tenant.run.pool.resident_byte_seconds(self.end) for tenant in self.tenants)

    def to_the_end(self) -> None:
        """Serve every request of every tenant, then check that tokens and memory were conserved."""
        now, turn = 0.0, 0
        while True:
            place = next((p for p in self._places(turn) if self._can_run(self.tenants[p], now)), None)
            if place is not None:
                now = self._iterate(self.tenants[place], now)
                turn = place + 1
                continue
            later = self._next_moment(now)
            if later is None:
                break
            now = later
        if any(tenant.has_work(now) for tenant in self.tenants):
            raise RunFailed("a tenant has work and there is no memory for it")
        self.end = now
        for tenant in self.tenants:
            tenant.run.clocks.check()
            tenant.run.pool.check()

    def _places(self, turn: int) -> list[int]:
        """Tenants in order of their turns."""
        return [(turn + step) % len(self.tenants) for step in range(len(self.tenants))]

    def _can_run(self, tenant: Tenant, now: float) -> bool:
        """Whether the tenant has work and its weights are there; asks for them where they are not."""
        if not tenant.has_work(now):
            return False
        if not tenant.awake and self._make_room(tenant, now):
            self._wake(tenant, now)
        return tenant.awake and tenant.ready <= now

    def _make_room(self, tenant: Tenant, now: float) -> bool:
        need_G = self._need_G[self.tenants.index(tenant)]
        leaving = self._leaving(need_G, now)
        for other in leaving or ():
            self._sleep(other, now)
        return leaving is not None

    def _leaving(self, more_G: FloatArray, now: float) -> list[Tenant] | None:
        """Who must go to sleep so that so many bytes more fit; None where not even that is enough."""
        awake = sorted((tenant for tenant in self.tenants if tenant.awake), key=lambda tenant: tenant.used)
        held_G = sum((tenant.bytes_G for tenant in awake), np.zeros(self.cluster.G)) + more_G
        leaving: list[Tenant] = []
        for tenant in awake:
            if (held_G <= self._memory).all():
                break
            if tenant.ready <= now and not tenant.has_work(now):
                leaving.append(tenant)
                held_G = held_G - tenant.bytes_G
        self._over_G = held_G - self._memory
        return None if (self._over_G > 0).any() else leaving

    def _sleep(self, tenant: Tenant, now: float) -> None:
        pool = tenant.run.pool
        pool.drop(np.ones(pool.born_LEG.shape, np.bool_), now)
        tenant.awake = False

    def _wake(self, tenant: Tenant, now: float) -> None:
        run = tenant.run
        # its other weights come first, over the same link; the containers are there
        restart = run.runtime.costs.load_seconds(float(run.spec.non_expert_bytes), run.pool.settings.home, 0)
        run.pool.engine_free_G[:] = np.maximum(run.pool.engine_free_G, now) + restart
        run.stage.wake(now)
        tenant.ready = max(float(run.pool.ready_at(plan).max()) for plan in run.stage.plans)
        if not math.isfinite(tenant.ready):
            raise RunFailed(f"GPU memory has no room for the plans of {run.spec.name}")
        tenant.awake, tenant.used = True, now
        tenant.wakes += 1

    def _iterate(self, tenant: Tenant, now: float) -> float:
        run, others = tenant.run, [other for other in self.tenants if other is not tenant]
        iteration = tenant.scheduler.next(now)
        if iteration is None:
            raise RunFailed("a tenant's scheduler has work that it never starts")
        run.now = now
        # steady decode steps may repeat until another tenant wants its turn
        if any(other.has_work(now) for other in others):
            run.until = now
        else:
            arrivals = [other.scheduler.next_arrival(now) for other in others]
            run.until = min((time for time in arrivals if time is not None), default=math.inf)
        run.serve(iteration)
        tenant.used = run.now
        # its KV cache or copies may have grown into memory that others hold
        leaving = self._leaving(np.zeros(self.cluster.G), run.now)
        if leaving is None:
            self.overflow_bytes = max(self.overflow_bytes, float(self._over_G.max()))
        for other in leaving or ():
            self._sleep(other, run.now)
        return run.now

    def _next_moment(self, now: float) -> float | None:
        """When somebody's work arrives or weights are there; None where all is done."""
        moments = []
        for tenant in self.tenants:
            if tenant.awake and tenant.ready > now:
                moments.append(tenant.ready)
            arrival = tenant.scheduler.next_arrival(now)
            if arrival is not None:
                moments.append(arrival)
        return min(moments, default=None)
