"""Which of several models on one set of GPUs are in its memory, who makes room for whom, and who waits.

A *tenant* is one model with its workload. It is *asleep* while its weights are in no GPU memory. It is woken when work
arrives: where memory is short, tenants without work are put to sleep first, least recently used first. Where that is
not enough it waits, for its patience at most: then those that have been in memory longest are *drained*, which is to
say that they admit no request, and sleep when the running ones have ended, and nobody else is woken before it. So no
tenant waits for ever, however busy the others are.
Loading goes on beside the others' iterations, and all tenants share each GPU's copy engine.

Axes: G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moeless.contracts import BoolArray, FloatArray
from moeless.errors import RunFailed
from moeless.simulator.failures import Failure
from moeless.simulator.loop import Caches, Run
from moeless.simulator.scaling import Scaling
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
        served: it has run an iteration since it was woken.
        wanted: since when it has asked for memory that it does not get; None where it does not.
        owed: KV caches of running requests that were lost, or given up, and are to be computed again before anything
            else of it runs.
    """

    run: Run
    scheduler: Continuous
    awake: bool = True
    ready: float = 0.0
    used: float = 0.0
    wakes: int = 0
    served: bool = False
    wanted: float | None = None
    owed: Caches | None = None

    def owe(self, lost: Caches) -> None:
        """Have these computed again, once each."""
        if self.owed is not None:
            new_N = ~np.isin(lost.request_N, self.owed.request_N)
            lost = Caches(
                *(np.concatenate([old_N, more_N[new_N]]) for old_N, more_N in zip(self.owed, lost, strict=True))
            )
        self.owed = lost if len(lost.request_N) else None

    @property
    def bytes_G(self) -> FloatArray:
        """Memory that it takes while awake: weights, and the KV cache of its running requests."""
        return self.run.pool.resident_G + self._other_G

    def firm_bytes_G(self, now: float) -> FloatArray:
        """The same without copies that no plan holds, which may go at any time."""
        return self.run.pool.firm_G(now) + self._other_G

    @property
    def _other_G(self) -> FloatArray:
        pool, other = self.run.pool, float(self.run.spec.non_expert_bytes)
        return np.asarray(other + (pool.room_G - pool.capacity_G) * (self.scheduler.num_running > 0))

    def demand(self, now: float) -> int:
        """Requests of it that run or wait."""
        self.scheduler.next_arrival(now)
        return self.scheduler.num_running + self.scheduler.num_waiting

    def has_work(self, now: float) -> bool:
        """Whether a request of it runs or waits."""
        return self.demand(now) > 0

    @property
    def idle_from(self) -> float:
        """Since when an awake tenant without work has had none."""
        return max(self.used, self.ready)

    def may_sleep(self, now: float) -> bool:
        """Whether it holds memory that nothing of it needs at the moment, or that it has to give up."""
        if self.ready > now:
            return False
        return not self.scheduler.num_running if self.scheduler.draining else not self.has_work(now)


class SharedMemory:
    """The memory of the GPUs that tenants share.

    Args:
        tenants: on the same cluster, their runs fresh.
        patience_seconds: how long a tenant with work waits for memory before others are drained; infinity: for ever.
        scaling: who takes more GPUs; None where all are held.

    Attributes:
        need_G: of each tenant, what it would take if it were woken.
        overflow_bytes: most by which a GPU's memory was exceeded while no tenant could leave.
        drains: how often a tenant had to give up its memory with work left.

    Raises:
        RunFailed: a tenant does not fit even alone.
    """

    def __init__(self, tenants: Sequence[Tenant], patience_seconds: float, scaling: Scaling | None) -> None:
        self.tenants, self.patience_seconds, self.scaling = tenants, patience_seconds, scaling
        self.cluster = tenants[0].run.cluster
        self.overflow_bytes, self.drains = 0.0, 0
        engine_free_G, held_G = np.zeros((2, self.cluster.G))
        self.need_G = [tenant.bytes_G for tenant in tenants]
        for tenant, need_G in zip(tenants, self.need_G, strict=True):
            tenant.run.pool.engine_free_G = engine_free_G
            if not self._fits(need_G):
                raise RunFailed(
                    f"{tenant.run.spec.name} needs {need_G.max() / 1e9:.1f} GB on a GPU of {self.cluster.name}, which "
                    f"has {self._memory / 1e9:.1f} GB; use more GPUs"
                )
            # whoever fits is there from the start, in the order given
            if self._fits(held_G + need_G):
                held_G = held_G + need_G
            else:
                self.sleep(tenant, 0.0)

    @property
    def _memory(self) -> float:
        return float(self.cluster.device.memory_bytes)

    @property
    def _down_G(self) -> BoolArray:
        return self.tenants[0].run.pool.down_G

    def _fits(self, held_G: FloatArray) -> bool:
        """Whether so many bytes are in the memory of the GPUs that work."""
        return bool((np.where(self._down_G, 0.0, held_G) <= self._memory).all())

    def look_again(self, now: float) -> None:
        """After GPUs were lost or came back: what a sleeping tenant needs, and when a loading one is there."""
        for place, tenant in enumerate(self.tenants):
            self.need_G[place] = self._waking_bytes_G(tenant)
            if tenant.awake and tenant.ready > now:
                tenant.ready = self._all_there(tenant)

    @staticmethod
    def _waking_bytes_G(tenant: Tenant) -> FloatArray:
        return tenant.run.stage.waking_bytes_G() + float(tenant.run.spec.non_expert_bytes)

    def lose(self, tenant: Tenant, failure: Failure, now: float) -> None:
        """A GPU or copy is lost: load again what the tenant had there, or wait for what is lost if it fits no more.

        Then it gives up the KV caches of running requests as well, as a server does that preempts requests to compute
        them again.
        """
        run = tenant.run
        run.now = now
        tenant.owe(run.lose(failure, loads=False))
        if not tenant.awake:
            return
        if not tenant.scheduler.num_running:
            run.pool.share_memory(np.zeros(self.cluster.G), now)
        if (run.stage.waking_bytes_G() <= run.pool.capacity_G).all():
            run.stage.reload("failure", now)
        else:
            tenant.owe(run.cached())
            self.sleep(tenant, now)

    def _all_there(self, tenant: Tenant) -> float:
        """When the last copy of its plans is warm."""
        ready = max(float(tenant.run.pool.ready_at(plan).max()) for plan in tenant.run.stage.plans)
        if not math.isfinite(ready):
            raise RunFailed(f"GPU memory has no room for the plans of {tenant.run.spec.name}")
        return ready

    def settle(self, now: float) -> None:
        """Where tenants together have outgrown the memory, copies that no plan holds go, then who has no work."""
        none_G = np.zeros(self.cluster.G)
        leaving = self._leaving(none_G, now)
        if leaving is None:
            self.overflow_bytes = max(self.overflow_bytes, float(self._over_G.max()))
        self._clear(none_G, leaving or (), now)

    def can_run(self, tenant: Tenant, now: float) -> bool:
        """Whether the tenant has work and its weights are there; asks for them where they are not."""
        if not tenant.has_work(now):
            return False
        if not tenant.awake:
            # who has waited for its patience is next: smaller ones must not take what others leave for it
            room = self._next_in_line(now) in (None, tenant) and self._make_room(tenant, now)
            if not room:
                tenant.wanted = now if tenant.wanted is None else tenant.wanted
                if self._next_in_line(now) is tenant:
                    self._drain(tenant, now)
                    # whoever runs no request leaves at once
                    room = self._make_room(tenant, now)
            if room:
                self._wake(tenant, now)
        if not tenant.awake or tenant.ready > now:
            return False
        return bool(tenant.scheduler.num_running) or not tenant.scheduler.draining

    def _next_in_line(self, now: float) -> Tenant | None:
        """Who has waited longest for memory, and as long as it would; not who finds no room even alone."""
        waiting = [
            (tenant.wanted, place)
            for place, tenant in enumerate(self.tenants)
            if tenant.wanted is not None
            and now - tenant.wanted >= self.patience_seconds
            and self._fits(self.need_G[place])
        ]
        return self.tenants[min(waiting)[1]] if waiting else None

    def _drain(self, tenant: Tenant, now: float) -> None:
        """Let those in memory longest admit no more, as many as must leave for the tenant.

        Only who has served since it was woken: otherwise tenants could wake each other without a token for any.
        """
        awake = self._awake(lambda other: other.ready)
        held_G = sum((other.firm_bytes_G(now) for other in awake), self.need_G[self.tenants.index(tenant)])
        leaving: list[Tenant] = []
        for other in awake:
            if self._fits(held_G):
                break
            if other.served or other.may_sleep(now):
                leaving.append(other)
                held_G = held_G - other.firm_bytes_G(now)
        if not self._fits(held_G):
            return
        for other in leaving:
            if other.has_work(now) and not other.scheduler.draining:
                self.drains += 1
                other.scheduler.draining = True

    def _make_room(self, tenant: Tenant, now: float) -> bool:
        """Whether there is room for the tenant, for which others may go to sleep, or GPUs be taken and waited for."""
        need_G = self.need_G[self.tenants.index(tenant)]
        leaving = self._leaving(need_G, now)
        if self.scaling is not None and leaving != [] and (self.scaling.coming or leaving is None):
            awake = [other for other in self.tenants if other.awake]
            # those that work spread over GPUs that have come
            if all(other.used >= self.scaling.there_from or not other.has_work(now) for other in awake):
                self.scaling.more(now)
            return False
        if leaving is not None:
            self._clear(need_G, leaving, now)
        return leaving is not None

    def _clear(self, more_G: FloatArray, leaving: Iterable[Tenant], now: float) -> None:
        """Let tenants go to sleep, then evict what no plan holds, until so many bytes more fit."""
        for tenant in leaving:
            self.sleep(tenant, now)
        awake = self._awake(lambda tenant: tenant.used)
        for tenant in awake:
            over_G = sum((other.bytes_G for other in awake), more_G) - self._memory
            for gpu in np.flatnonzero((over_G > 0) & ~self._down_G).tolist():
                tenant.run.pool.shed(gpu, float(over_G[gpu]), now)

    def _awake(self, key: Callable[[Tenant], float]) -> list[Tenant]:
        return sorted((tenant for tenant in self.tenants if tenant.awake), key=key)

    def _leaving(self, more_G: FloatArray, now: float) -> list[Tenant] | None:
        """Who must go to sleep so that so many bytes more fit; None where not even that is enough."""
        awake = self._awake(lambda tenant: tenant.used)
        if self._fits(sum((tenant.bytes_G for tenant in awake), more_G)):
            return []
        held_G = sum((tenant.firm_bytes_G(now) for tenant in awake), more_G)
        leaving: list[Tenant] = []
        for tenant in awake:
            if self._fits(held_G):
                break
            if tenant.may_sleep(now):
                leaving.append(tenant)
                held_G = held_G - tenant.firm_bytes_G(now)
        self._over_G = np.where(self._down_G, 0.0, held_G - self._memory)
        return leaving if self._fits(held_G) else None

    def sleep(self, tenant: Tenant, now: float) -> None:
        """Take a tenant's weights out of memory."""
        pool = tenant.run.pool
        pool.drop(np.ones(pool.born_LEG.shape, np.bool_), now)
        pool.share_memory(np.zeros(self.cluster.G), now)
        tenant.awake = tenant.served = tenant.scheduler.draining = False
        self.need_G[self.tenants.index(tenant)] = self._waking_bytes_G(tenant)

    def _wake(self, tenant: Tenant, now: float) -> None:
        run = tenant.run
        # its other weights come first, over the same link; the containers are there
        restart = run.runtime.costs.load_seconds(float(run.spec.non_expert_bytes), run.pool.settings.home, 0)
        run.pool.engine_free_G[:] = np.maximum(run.pool.engine_free_G, now) + restart
        run.stage.wake(now)
        tenant.ready = self._all_there(tenant)
        tenant.awake, tenant.used, tenant.wanted = True, now, None
        tenant.wakes += 1
        for other in self.tenants:
            # it fits: nobody has to leave for it any more
            other.scheduler.draining = False
