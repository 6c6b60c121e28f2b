"""Several models on one set of GPUs: their iterations take turns, their weights share the memory.

Each iteration has all GPUs to itself, as in time-sliced serving; tenants that have work take turns. Who is in memory,
and who has to wait for it, is said in `tenants`.

A GPU that a tenant's run is to lose is lost to all of them: each tenant's copies and KV caches on it. The iterations
that compute these again take turns as well. A copy's failure is its tenant's alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moeless.contracts import BoolArray, FloatArray
from moeless.errors import RunFailed, UserError
from moeless.simulator.failures import Failure
from moeless.simulator.loop import Run
from moeless.simulator.scaling import Member, Scaling
from moeless.simulator.tenants import SharedMemory, Tenant
from moeless.workloads.continuous import Continuous

#: Seconds that a tenant with work waits for memory before others are drained.
PATIENCE_SECONDS = 5.0


def _returns(run: Run) -> tuple[float, float, float | None]:
    """After how many idle seconds all GPUs are given back (infinity: never), a container's start, requests a GPU."""
    settings = run.pool.settings
    keep_seconds = settings.keep_alive.seconds if run.pool.gives_back else math.inf
    return keep_seconds, settings.container_seconds, settings.requests_per_gpu


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
            if _returns(run) != _returns(runs[0]):
                raise UserError(
                    "tenants of a shared pool must agree on scale to zero, keep-alive, container start and GPUs"
                )
            self.tenants.append(Tenant(run, run.scheduler))
        self.end, self._idle = 0.0, 0.0
        self._keep, self._container, _ = _returns(runs[0])
        # since when nobody has work; infinity: somebody has
        self._quiet_from = math.inf
        self._members: list[Member] = []
        self._failures = self._hand_over()
        self._scaling = Scaling(self._members) if self._members else None
        self.memory = SharedMemory(self.tenants, patience_seconds, self._scaling)

    def _hand_over(self) -> list[tuple[Failure, Tenant | None]]:
        """What breaks, in order of time: a copy with its tenant, a GPU once, however many runs name it, with None."""
        found: dict[tuple[Failure, int | None], tuple[Failure, Tenant | None]] = {}
        for place, tenant in enumerate(self.tenants):
            failures, scaling = tenant.run.hand_over()
            if scaling is not None:
                self._members += scaling.members
            for failure in failures:
                alone = failure.layer is not None
                found[failure, place if alone else None] = failure, tenant if alone else None
        return sorted(found.values(), key=lambda pair: pair[0].seconds)

    @property
    def gpu_seconds(self) -> float:
        """Sum over GPUs of the seconds up to ``end`` for which each was held."""
        return self.tenants[0].run.pool.gpu_seconds(self.end)

    @property
    def _held_G(self) -> BoolArray:
        return self.tenants[0].run.pool.held_G

    def _next_change(self, now: float) -> float:
        """When something breaks, or GPUs or an idle model's memory are to be given back."""
        moments = [self._failures[0][0].seconds] if self._failures else []
        if self._scaling is not None and self._held_G.any():
            ends = [each.idle_from + self._keep for each in self.tenants if each.awake and not each.has_work(now)]
            moments += [self._scaling.next_event, *(end for end in ends if end > now)]
        return min(moments, default=math.inf)

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
            assert tenant.run.pool.gpu_seconds(now) == self.gpu_seconds, "a GPU was not held by all models alike"
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
        if later > end and self._held_G.any():
            for tenant in self.tenants:
                if tenant.awake:
                    self.memory.sleep(tenant, end)
                tenant.run.pool.hold(np.zeros(self.cluster.G, np.bool_), end)
        if self._held_G.any() or not any(tenant.has_work(later) for tenant in self.tenants):
            return later
        self._quiet_from = math.inf
        if self._scaling is not None:
            self._tell_scaling(later)
            self._scaling.wake(later, self._demand(later))
        for tenant in self.tenants:
            if self._scaling is None:
                # others are taken for those that were lost
                tenant.run.pool.hold(np.ones(self.cluster.G, np.bool_), later)
                tenant.run.stage.gpus_back(math.inf, loads=False)
        later = self._wait("container", self._container, later)
        self.memory.look_again(later)
        return later

    def _wait(self, cause: str, seconds: float, now: float) -> float:
        """Nothing runs for so long from ``now`` on; returns when it does again."""
        for tenant in self.tenants:
            tenant.run.waited(cause, seconds, now + seconds, self._waits_from(tenant, now))
        self._idle += seconds
        return now + seconds

    def _demand(self, now: float) -> int:
        """Requests that run or wait."""
        return sum(tenant.demand(now) for tenant in self.tenants)

    def _tell_scaling(self, now: float) -> None:
        """Who is in memory, and who needs it: all that are there, or those with work where the others go to sleep."""
        assert self._scaling is not None
        for tenant, member in zip(self.tenants, self._members, strict=True):
            if tenant.awake and not member.awake:
                # its copies may be on GPUs that are about to leave
                self._scaling.stay()
            member.awake = tenant.awake
            member.counts = tenant.has_work(now) or (tenant.awake and (math.isinf(self._keep) or tenant.ready > now))

    def _kv_bytes_G(self) -> FloatArray:
        kv_bytes_G = np.zeros(self.cluster.G)
        for tenant in self.tenants:
            # who sleeps has given them up
            if tenant.awake:
                kv_bytes_G += tenant.run.kv_bytes_G()
        return kv_bytes_G

    def _scale(self, now: float) -> None:
        """Put who has been idle for a keep-alive to sleep; hold as many GPUs as the others need."""
        assert self._scaling is not None
        for tenant in self.tenants:
            if tenant.awake and tenant.idle_from + self._keep <= now and not tenant.has_work(now):
                self.memory.sleep(tenant, max(tenant.idle_from + self._keep, tenant.run.now))
        self._tell_scaling(now)
        down_G = self._scaling.outage.down_G.copy()
        self._scaling.adapt(now, self._demand(now), self._kv_bytes_G())
        if (down_G != self._scaling.outage.down_G).any():
            self.memory.look_again(now)
            self.memory.settle(now)

    def _happen(self, now: float) -> float:
        """Let what is due take effect on all tenants at once; returns when serving goes on."""
        back = [tenant.run.stage.gpus_back(now, tenant.awake) for tenant in self.tenants]
        if any(back):
            self.memory.look_again(now)
        while self._failures and self._failures[0][0].seconds <= now:
            failure, only = self._failures.pop(0)
            if not self._held_G[failure.gpu]:
                # it hits a GPU that is somebody else's
                continue
            now = self._wait("failure", failure.detection_seconds, now)
            if self._scaling is not None and failure.layer is None:
                now = self._replace(self._scaling, failure.gpu, now)
            for tenant in self.tenants:
                if only in (None, tenant):
                    self.memory.lose(tenant, failure, now)
            if self._scaling is not None and failure.layer is None:
                self._scaling.lost(failure.gpu, now, failure.seconds + failure.restart_seconds)
            if self._failures and self._failures[0][0].seconds <= now:
                continue
            self.memory.look_again(now)
            for tenant in self.tenants:
                # who sleeps does so once it is awake
                if tenant.awake:
                    now = self._recover(tenant, now)
            self.memory.settle(now)
        if self._scaling is not None and self._held_G.any():
            self._scale(now)
        return now

    def _replace(self, scaling: Scaling, gpu: int, now: float) -> float:
        """Where too few GPUs are left without a lost one, serving waits for others; returns until when."""
        self._tell_scaling(now)
        there = scaling.replace(gpu, float(self._kv_bytes_G().sum()), now)
        if there > now:
            now = max(there, self._wait("container", there - now, now))
            for tenant in self.tenants:
                tenant.run.stage.gpus_back(now, tenant.awake)
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
            run.until = min(run.until, self._next_change(now))
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
        if moments:
            moments.append(self._next_change(now))
        if moments and self._scaling is not None:
            moments.append(self._scaling.next_free(now))
        first = min(moments, default=math.inf)
        # a GPU may have come back while another loss was noticed
        return max(now, first) if first < math.inf else None
