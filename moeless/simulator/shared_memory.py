"""Which of several models on one set of GPUs are in its memory, who makes room for whom, and who waits.

A tenant is *asleep* while its weights are in no GPU memory. It is woken when work arrives: where memory is short,
tenants without work are put to sleep first, least recently used first. Where that is not enough it waits, for its
patience at most: then those that have been in memory longest are *drained*. They admit no request, and sleep when the
running ones have ended; nobody else is woken before. So no tenant waits for ever, however busy the others are.
Loading goes on beside the others' iterations, and all tenants share each GPU's copy engine.

Axes: G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from moeless.contracts import BoolArray, FloatArray
from moeless.errors import RunFailed
from moeless.simulator.failures import Failure
from moeless.simulator.gpu_scaling import Scaling
from moeless.simulator.tenants import Tenant


class SharedMemory:
    """The memory of the GPUs that tenants share.

    Args:
        tenants: on the same cluster, and fresh.
        patience_seconds: how long a tenant with work waits for memory before others are drained; infinity: for ever.
        scaling: who takes more GPUs; None where all are held.

    Attributes:
        overflow_bytes: most by which a GPU's memory was exceeded while no tenant could leave.
        drains: how often a tenant had to give up its memory with work left.

    Raises:
        RunFailed: a tenant does not fit even alone.
    """

    def __init__(self, tenants: Sequence[Tenant], patience_seconds: float, scaling: Scaling | None) -> None:
        self.tenants, self.patience_seconds, self.scaling = tenants, patience_seconds, scaling
        self.cluster = tenants[0].cluster
        self.overflow_bytes, self.drains = 0.0, 0
        engine_free_G, held_G = np.zeros((2, self.cluster.G))
        for tenant in tenants:
            tenant.instances.engine_free_G = engine_free_G
            if not self._fits(tenant.need_G):
                raise RunFailed(
                    f"{tenant.spec.name} needs {tenant.need_G.max() / 1e9:.1f} GB on a GPU of {self.cluster.name}, "
                    f"which has {self._memory / 1e9:.1f} GB; use more GPUs"
                )
            # whoever fits is there from the start, in the order given
            if self._fits(held_G + tenant.need_G):
                held_G = held_G + tenant.need_G
            else:
                self.sleep(tenant, 0.0)

    @property
    def _memory(self) -> float:
        return float(self.cluster.device.memory_bytes)

    @property
    def _down_G(self) -> BoolArray:
        return self.tenants[0].instances.down_G

    def _fits(self, held_G: FloatArray) -> bool:
        """Whether so many bytes are in the memory of the GPUs that work."""
        return not np.count_nonzero((held_G > self._memory) & ~self._down_G)

    def look_again(self, now: float) -> None:
        """After GPUs were lost or came back: what a sleeping tenant needs, and when a loading one is there."""
        for tenant in self.tenants:
            tenant.need_G = tenant.waking_bytes_G
            if tenant.awake and tenant.ready > now:
                tenant.ready = tenant.all_loaded
                tenant.loaded.schedule(tenant.ready)

    def lose(self, tenant: Tenant, failure: Failure, now: float) -> None:
        """A GPU or copy is lost: load again what the tenant had there, or wait for what is lost if it fits no more.

        Then it gives up the KV caches of running requests as well, as a server does that preempts requests to compute
        them again.
        """
        tenant.lose(failure, now)
        if not tenant.awake:
            return
        if not tenant.scheduler.num_running:
            tenant.instances.share_memory(np.zeros(self.cluster.G), now)
        if (tenant.stage.waking_bytes_G() <= tenant.instances.capacity_G).all():
            tenant.stage.reload("failure", now)
        else:
            tenant.owed |= dict.fromkeys(tenant.cached()[0].tolist())
            self.sleep(tenant, now)

    def settle(self, now: float) -> None:
        """Where tenants together have outgrown the memory, copies that no plan holds go, then who has no work.

        A tenant that is alone has made room for its KV cache by itself.
        """
        if len(self.tenants) == 1:
            return
        none_G = np.zeros(self.cluster.G)
        leaving = self._leaving(none_G, now)
        if leaving == []:
            return
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
                tenant.wanted = min(tenant.wanted, now)
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
        waiting = [t for t in self.tenants if now - t.wanted >= self.patience_seconds and self._fits(t.need_G)]
        return min(waiting, key=lambda tenant: tenant.wanted, default=None)

    def _drain(self, tenant: Tenant, now: float) -> None:
        """Let those in memory longest admit no more, as many as must leave for the tenant.

        Only who has served since it was woken: otherwise tenants could wake each other without a token for any.
        """
        awake = self._awake(lambda other: other.ready)
        leaving = self._enough(
            awake, tenant.need_G, lambda other: other.used > other.ready or other.may_sleep(now), now
        )
        for other in leaving or ():
            if other.has_work(now) and not other.scheduler.draining:
                self.drains += 1
                other.scheduler.draining = True

    def _make_room(self, tenant: Tenant, now: float) -> bool:
        """Whether there is room for the tenant, for which others may go to sleep, or GPUs be taken and waited for."""
        leaving = self._leaving(tenant.need_G, now)
        if self.scaling is not None and leaving != [] and (self.scaling.coming or leaving is None):
            awake = [other for other in self.tenants if other.awake]
            # those that work spread over GPUs that have come
            if all(other.used >= self.scaling.there_from or not other.has_work(now) for other in awake):
                self.scaling.more(now)
            return False
        if leaving is not None:
            self._clear(tenant.need_G, leaving, now)
        return leaving is not None

    def _clear(self, more_G: FloatArray, leaving: Iterable[Tenant], now: float) -> None:
        """Let tenants go to sleep, then evict what no plan holds, until so many bytes more fit."""
        for tenant in leaving:
            self.sleep(tenant, now)
        awake = self._awake(lambda tenant: tenant.used)
        for tenant in awake:
            over_G = sum((other.bytes_G for other in awake), more_G) - self._memory
            for gpu in np.flatnonzero((over_G > 0) & ~self._down_G).tolist():
                tenant.instances.shed(gpu, float(over_G[gpu]), now)

    def _awake(self, key: Callable[[Tenant], float]) -> list[Tenant]:
        return sorted((tenant for tenant in self.tenants if tenant.awake), key=key)

    def _leaving(self, more_G: FloatArray, now: float) -> list[Tenant] | None:
        """Who must go to sleep so that so many bytes more fit; None where not even that is enough."""
        awake = self._awake(lambda tenant: tenant.used)
        if self._fits(sum((tenant.bytes_G for tenant in awake), more_G)):
            return []
        return self._enough(awake, more_G, lambda tenant: tenant.may_sleep(now), now)

    def _enough(
        self, awake: Sequence[Tenant], more_G: FloatArray, may_leave: Callable[[Tenant], bool], now: float
    ) -> list[Tenant] | None:
        """The first of those awake that may leave, so that more fits beside the others; None where all are too few."""
        held_G = sum((tenant.firm_bytes_G(now) for tenant in awake), more_G)
        leaving: list[Tenant] = []
        for tenant in awake:
            if not self._fits(held_G) and may_leave(tenant):
                leaving.append(tenant)
                held_G = held_G - tenant.firm_bytes_G(now)
        self._over_G = np.where(self._down_G, 0.0, held_G - self._memory)
        return leaving if self._fits(held_G) else None

    def empty(self, tenant: Tenant, now: float) -> None:
        """Drop all copies of a tenant."""
        tenant.instances.drop(np.ones(tenant.instances.born_LEG.shape, np.bool_), now)
        tenant.instances.share_memory(np.zeros(self.cluster.G), now)

    def sleep(self, tenant: Tenant, now: float) -> None:
        """Take a tenant's weights out of memory."""
        self.empty(tenant, now)
        tenant.awake = tenant.scheduler.draining = False
        tenant.expired.cancel()
        tenant.need_G = tenant.waking_bytes_G

    def _wake(self, tenant: Tenant, now: float) -> None:
        # its other weights come first, over the same link; the containers are there
        engine_free_G = tenant.instances.engine_free_G
        engine_free_G[:] = np.maximum(engine_free_G, now) + tenant.instances.restart_seconds
        tenant.stage.wake(now)
        tenant.ready = tenant.all_loaded
        if tenant.ready > now:
            tenant.loaded.schedule(tenant.ready)
        tenant.awake, tenant.used, tenant.wanted = True, now, math.inf
        tenant.wakes += 1
        for other in self.tenants:
            # it fits: nobody has to leave for it any more
            other.scheduler.draining = False
