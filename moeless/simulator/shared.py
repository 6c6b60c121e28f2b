"""Several models on one set of GPUs: their iterations take turns, their weights share the memory.

Each iteration has all GPUs to itself, as in time-sliced serving; tenants that have work take turns. Who is in memory,
and who has to wait for it, is said in `tenants`.

A GPU that a tenant's run is to lose is lost to all of them: each tenant's copies and KV caches on it. The iterations
that compute these again take turns as well. A copy's failure is its tenant's alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from moeless.errors import RunFailed, UserError
from moeless.simulator.failures import Failure
from moeless.simulator.loop import Run
from moeless.simulator.tenants import SharedMemory, Tenant
from moeless.workloads.continuous import Continuous

#: Seconds that a tenant with work waits for memory before others are drained.
PATIENCE_SECONDS = 5.0


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
        memory: who is in it, with its accounts.

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
        self.end, self._idle = 0.0, 0.0
        self._failures = self._hand_over()
        self._keep, self._container = _returns(runs[0])
        # since when nobody has work, and since when no GPU is held; infinity: somebody has, all are
        self._quiet_from, self._away_from, self._released = math.inf, math.inf, 0.0
        self.memory = SharedMemory(self.tenants, patience_seconds)

    def _hand_over(self) -> list[tuple[Failure, Tenant | None]]:
        """What breaks, in order of time: a copy with its tenant, a GPU once, however many runs name it, with None."""
        found: dict[tuple[Failure, int | None], tuple[Failure, Tenant | None]] = {}
        for place, tenant in enumerate(self.tenants):
            for failure in tenant.run.hand_over_failures():
                alone = failure.layer is not None
                found[failure, place if alone else None] = failure, tenant if alone else None
        return sorted(found.values(), key=lambda pair: pair[0].seconds)

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
            place = next((p for p in places if self.memory.can_run(self.tenants[p], now)), None)
            if place is not None:
                now = self._iterate(self.tenants[place], now)
                turn = place + 1
                continue
            later = self._next_moment(now)
            if later is None:
                break
            self._idle += later - now
            now = self._pass_time(now, later)
        for tenant in self.tenants:
            if tenant.has_work(now):
                raise RunFailed(f"{tenant.run.spec.name} has work, and the GPUs that are left have no room for it")
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
                    self.memory.sleep(tenant, end)
        if math.isinf(self._away_from) or not any(tenant.has_work(later) for tenant in self.tenants):
            return later
        self._released += later - self._away_from
        self._quiet_from = self._away_from = math.inf
        for tenant in self.tenants:
            tenant.run.waited("container", self._container, later + self._container, self._waits_from(tenant, later))
            # others are taken for those that were lost
            tenant.run.stage.gpus_back(math.inf, loads=False)
        self.memory.look_again(later)
        self._idle += self._container
        return later + self._container

    def _happen(self, now: float) -> float:
        """Let what is due take effect on all tenants at once; returns when serving goes on."""
        back = [tenant.run.stage.gpus_back(now, tenant.awake) for tenant in self.tenants]
        if any(back):
            self.memory.look_again(now)
        while self._failures and self._failures[0][0].seconds <= now:
            failure, only = self._failures.pop(0)
            if math.isfinite(self._away_from):
                # it hits a GPU that is somebody else's
                continue
            seconds = failure.detection_seconds
            waits_from = [self._waits_from(tenant, now) for tenant in self.tenants]
            now, self._idle = now + seconds, self._idle + seconds
            for tenant, since in zip(self.tenants, waits_from, strict=True):
                tenant.run.waited("failure", seconds, now, since)
                if only in (None, tenant):
                    self.memory.lose(tenant, failure, now)
            if self._failures and self._failures[0][0].seconds <= now:
                continue
            self.memory.look_again(now)
            for tenant in self.tenants:
                # who sleeps does so once it is awake
                if tenant.awake:
                    now = self._recover(tenant, now)
            self.memory.settle(now)
        return now

    @staticmethod
    def _recover(tenant: Tenant, now: float) -> float:
        """Compute lost KV caches again; returns when that ended."""
        if tenant.owed is None:
            return now
        owed, tenant.owed, tenant.run.now = tenant.owed, None, now
        tenant.run.recover(owed)
        return tenant.run.now

    def _waits_from(self, tenant: Tenant, now: float) -> float:
        """From when on a request of it waits, infinity where none will."""
        if tenant.has_work(now):
            return now
        arrival = tenant.scheduler.next_arrival(now)
        return math.inf if arrival is None else arrival

    def _iterate(self, tenant: Tenant, now: float) -> float:
        """Have a tenant's next iteration, or compute again what it had to give up; returns when that ended."""
        if tenant.owed is not None:
            self._quiet_from = math.inf
            return self._recover(tenant, now)
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
        self.memory.settle(run.now)
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
        first = min(moments, default=math.inf)
        # a GPU may have come back while another loss was noticed
        return max(now, first) if first < math.inf else None
