"""Several models on one set of GPUs: their iterations take turns, their weights share the memory.

A *tenant* is one model with its workload. Each iteration has all GPUs to itself, as in time-sliced serving; tenants
that have work take turns. A tenant is *asleep* while its weights are in no GPU memory. It is woken when work arrives:
where memory is short, tenants without work are put to sleep first, least recently used first. Where that is not enough
it waits, for its patience at most: then those that have been in memory longest are *drained*, which is to say that they
admit no request, and sleep when the running ones have ended, and nobody else is woken before it. So no tenant waits for
ever, however busy the others are.
Loading goes on beside the others' iterations, and all tenants share each GPU's copy engine.

A GPU that a tenant's run is to lose is lost to all of them: each tenant's copies and KV caches on it. The iterations
that compute these again take turns as well. A copy's failure is its tenant's alone.

Axes: G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeless.contracts import BoolArray, FloatArray
from moeless.errors import RunFailed, UserError
from moeless.simulator.failures import Failure
from moeless.simulator.loop import Run
from moeless.workloads.continuous import Continuous

#: Seconds that a tenant with work waits for memory before others are drained.
PATIENCE_SECONDS = 5.0


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
    """

    run: Run
    scheduler: Continuous
    awake: bool = True
    ready: float = 0.0
    used: float = 0.0
    wakes: int = 0
    served: bool = False
    wanted: float | None = None

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

    def may_sleep(self, now: float) -> bool:
        """Whether it holds memory that nothing of it needs at the moment, or that it has to give up."""
        if self.ready > now:
            return False
        return not self.scheduler.num_running if self.scheduler.draining else not self.has_work(now)


def _returns(run: Run) -> tuple[float, float]:
    """After how many idle seconds GPUs are given back (infinity: never), and how long a container takes to start."""
    settings = run.pool.settings
    return settings.keep_alive.seconds if run.pool.gives_back else math.inf, settings.container_seconds


class SharedPool:
    """Tenants on the same GPUs.

    Args:
        runs: fresh, one per tenant, all on the same cluster and with continuous batching.
        patience_seconds: how long a tenant with work waits for memory before others are drained; infinity: for ever.

    Attributes:
        end: when the last token of all tenants came.
        overflow_bytes: most by which a GPU's memory was exceeded while no tenant could leave.
        drains: how often a tenant had to give up its memory with work left.

    Raises:
        UserError: no tenant, clusters that differ, another batching, or a negative patience.
        RunFailed: a tenant does not fit into memory even alone.
    """

    def __init__(self, runs: Sequence[Run], patience_seconds: float = PATIENCE_SECONDS) -> None:
        if not patience_seconds >= 0:
            raise UserError(f"a tenant's patience must be at least 0 seconds, got {patience_seconds}")
        if not runs or any(run.cluster != runs[0].cluster for run in runs):
            raise UserError("a shared pool needs at least one tenant, and all tenants on the same cluster")
        self.cluster = runs[0].cluster
        self.tenants = []
        for run in runs:
            if not isinstance(run.scheduler, Continuous):
                raise UserError("tenants of a shared pool are served with continuous batching")
            if run.scaling is not None:
                raise UserError("a shared pool gives back all of its GPUs or none: leave requests_per_gpu out")
            if _returns(run) != _returns(runs[0]):
                raise UserError("tenants of a shared pool must agree on scale to zero, keep-alive and container start")
            self.tenants.append(Tenant(run, run.scheduler))
        self.end, self.overflow_bytes, self.drains, self._idle = 0.0, 0.0, 0, 0.0
        self._failures = self._hand_over()
        self._keep, self._container = _returns(runs[0])
        # since when nobody has work, and since when no GPU is held; infinity: somebody has, all are
        self._quiet_from, self._away_from, self._released = math.inf, math.inf, 0.0
        self.patience_seconds = patience_seconds
        engine_free_G = np.zeros(self.cluster.G)
        self._need_G = [tenant.bytes_G for tenant in self.tenants]
        held_G = np.zeros(self.cluster.G)
        for tenant, need_G in zip(self.tenants, self._need_G, strict=True):
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
                self._sleep(tenant, 0.0)

    @property
    def _memory(self) -> float:
        return float(self.cluster.device.memory_bytes)

    def _hand_over(self) -> list[tuple[Failure, Tenant | None]]:
        """What breaks, in order of time: a copy with its tenant, a GPU once, however many runs name it, with None."""
        found: dict[tuple[Failure, int | None], tuple[Failure, Tenant | None]] = {}
        for place, tenant in enumerate(self.tenants):
            for failure in tenant.run.hand_over_failures():
                alone = failure.layer is not None
                found[failure, place if alone else None] = failure, tenant if alone else None
        return sorted(found.values(), key=lambda pair: pair[0].seconds)

    @property
    def _down_G(self) -> BoolArray:
        return self.tenants[0].run.pool.down_G

    def _fits(self, held_G: FloatArray) -> bool:
        """Whether so many bytes are in the memory of the GPUs that work."""
        return bool((np.where(self._down_G, 0.0, held_G) <= self._memory).all())

    @property
    def gpu_seconds(self) -> float:
        """Of all GPUs from 0 to ``end``, without the time for which they were given back."""
        return self.cluster.G * (self.end - self._released)

    @property
    def resident_byte_seconds(self) -> float:
        """Of all tenants' expert copies."""
        return sum(tenant.run.pool.resident_byte_seconds(self.end) for tenant in self.tenants)

    def to_the_end(self) -> None:
        """Serve every request of every tenant, then check that tokens and memory were conserved."""
        now, turn = 0.0, 0
        while True:
            now = self._happen(now)
            places = [(turn + step) % len(self.tenants) for step in range(len(self.tenants))]
            place = next((p for p in places if self._can_run(self.tenants[p], now)), None)
            if place is not None:
                now = self._iterate(self.tenants[place], now)
                turn = place + 1
                continue
            later = self._next_moment(now)
            if later is None:
                break
            self._idle += later - now
            now = self._pass_time(now, later)
        if any(tenant.has_work(now) for tenant in self.tenants):
            raise RunFailed("a tenant has work and there is no memory for it")
        self.end = now
        for tenant in self.tenants:
            tenant.run.clocks.check()
            tenant.run.pool.check()
        busy = sum(tenant.run.busy for tenant in self.tenants)
        assert math.isclose(now, busy + self._idle, rel_tol=1e-9, abs_tol=1e-9), "time was lost"

    def _pass_time(self, now: float, later: float) -> float:
        """Nobody can run until ``later``; GPUs that nobody has work for are given back, and taken when somebody has."""
        if any(tenant.has_work(now) or tenant.ready > now for tenant in self.tenants):
            self._quiet_from = math.inf
            return later
        self._quiet_from = min(self._quiet_from, now)
        # something may have been noticed or loaded since
        end = max(now, self._quiet_from + self._keep)
        if later > end and math.isinf(self._away_from):
            self._away_from = end
            for tenant in self.tenants:
                if tenant.awake:
                    self._sleep(tenant, end)
        if math.isinf(self._away_from) or not any(tenant.has_work(later) for tenant in self.tenants):
            return later
        self._released += later - self._away_from
        self._quiet_from = self._away_from = math.inf
        for tenant in self.tenants:
            tenant.run.waited("container", self._container, later + self._container, self._waits_from(tenant, later))
            # others are taken for those that were lost
            tenant.run.stage.gpus_back(math.inf, loads=False)
        self._look_again(later)
        self._idle += self._container
        return later + self._container

    def _happen(self, now: float) -> float:
        """Let what is due take effect on all tenants at once; returns when serving goes on."""
        back = [tenant.run.stage.gpus_back(now, tenant.awake) for tenant in self.tenants]
        if any(back):
            self._look_again(now)
        while self._failures and self._failures[0][0].seconds <= now:
            failure, only = self._failures.pop(0)
            if math.isfinite(self._away_from):
                # it hits a GPU that is somebody else's
                continue
            seconds = failure.detection_seconds
            waits_from = [self._waits_from(tenant, now) for tenant in self.tenants]
            now, self._idle = now + seconds, self._idle + seconds
            lost = []
            for tenant, since in zip(self.tenants, waits_from, strict=True):
                tenant.run.waited("failure", seconds, now, since)
                if only in (None, tenant):
                    tenant.run.now = now
                    lost.append((tenant, tenant.run.lose(failure, tenant.awake)))
            self._look_again(now)
            for tenant, caches in lost:
                tenant.run.now = now
                tenant.run.recover(caches)
                now = tenant.run.now
            self._settle(now)
        return now

    def _waits_from(self, tenant: Tenant, now: float) -> float:
        """From when on a request of it waits, infinity where none will."""
        if tenant.has_work(now):
            return now
        arrival = tenant.scheduler.next_arrival(now)
        return math.inf if arrival is None else arrival

    def _look_again(self, now: float) -> None:
        """After GPUs were lost or came back: what a sleeping tenant needs, and when a loading one is there."""
        for place, tenant in enumerate(self.tenants):
            run = tenant.run
            self._need_G[place] = run.stage.waking_bytes_G() + float(run.spec.non_expert_bytes)
            if tenant.awake and tenant.ready > now:
                tenant.ready = self._all_there(tenant)

    def _all_there(self, tenant: Tenant) -> float:
        """When the last copy of its plans is warm."""
        ready = max(float(tenant.run.pool.ready_at(plan).max()) for plan in tenant.run.stage.plans)
        if not math.isfinite(ready):
            raise RunFailed(f"GPU memory has no room for the plans of {tenant.run.spec.name}")
        return ready

    def _settle(self, now: float) -> None:
        """Where tenants together have outgrown the memory, those without work make room."""
        leaving = self._leaving(np.zeros(self.cluster.G), now)
        if leaving is None:
            self.overflow_bytes = max(self.overflow_bytes, float(self._over_G.max()))
        for other in leaving or ():
            self._sleep(other, now)

    def _can_run(self, tenant: Tenant, now: float) -> bool:
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
            and self._fits(self._need_G[place])
        ]
        return self.tenants[min(waiting)[1]] if waiting else None

    def _drain(self, tenant: Tenant, now: float) -> None:
        """Let those in memory longest admit no more, as many as must leave for the tenant.

        Only who has served since it was woken: otherwise tenants could wake each other without a token for any.
        """
        awake = sorted((other for other in self.tenants if other.awake), key=lambda other: other.ready)
        held_G = sum((other.bytes_G for other in awake), self._need_G[self.tenants.index(tenant)])
        leaving: list[Tenant] = []
        for other in awake:
            if self._fits(held_G):
                break
            if other.served or other.may_sleep(now):
                leaving.append(other)
                held_G = held_G - other.bytes_G
        if not self._fits(held_G):
            return
        for other in leaving:
            if other.has_work(now) and not other.scheduler.draining:
                self.drains += 1
                other.scheduler.draining = True

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
            if self._fits(held_G):
                break
            if tenant.may_sleep(now):
                leaving.append(tenant)
                held_G = held_G - tenant.bytes_G
        self._over_G = np.where(self._down_G, 0.0, held_G - self._memory)
        return leaving if self._fits(held_G) else None

    def _sleep(self, tenant: Tenant, now: float) -> None:
        pool = tenant.run.pool
        pool.drop(np.ones(pool.born_LEG.shape, np.bool_), now)
        tenant.awake = tenant.served = tenant.scheduler.draining = False

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

    def _iterate(self, tenant: Tenant, now: float) -> float:
        run, others = tenant.run, [other for other in self.tenants if other is not tenant]
        iteration, self._quiet_from = tenant.scheduler.next(now), math.inf
        if iteration is None:
            raise RunFailed("a tenant's scheduler has work that it never starts")
        run.now = now
        # steady decode steps may repeat until another tenant wants its turn
        if any(other.has_work(now) for other in others):
            run.until = now
        else:
            arrivals = [other.scheduler.next_arrival(now) for other in others]
            run.until = min((time for time in arrivals if time is not None), default=math.inf)
            if self._failures:
                run.until = min(run.until, self._failures[0][0].seconds)
        run.serve(iteration)
        tenant.used, tenant.served = run.now, True
        # its KV cache or copies may have grown into memory that others hold
        self._settle(run.now)
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
            if moments or tenant.has_work(now):
                moments.append(tenant.run.stage.outage.next_return)
        if moments and self._failures:
            moments.append(self._failures[0][0].seconds)
        return min((moment for moment in moments if moment < math.inf), default=None)
