"""A set of GPUs and the models that are served on it: one, or several whose iterations take turns.

Each iteration has all GPUs to itself, as in time-sliced serving; models that have work take turns. Which are in memory,
and which have to wait for it, is `shared_memory`'s matter, how many GPUs are held `gpu_scaling`'s.

Whatever happens takes effect when the iteration at that moment ends. A GPU that one model's run is to lose is lost to
all of them: each model's copies and KV caches on it. A copy's failure is its model's alone.

Where a model is alone, its layers wait for the copies that they need, and nobody is held up by that. Where several
share the GPUs, one that was put to sleep runs again when all its weights are there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moeless.errors import RunFailed, UserError
from moeless.simulator.events import Event, EventQueue, Kind
from moeless.simulator.gpu_scaling import Scaling
from moeless.simulator.shared_memory import SharedMemory
from moeless.simulator.tenants import Tenant
from moeless.workloads.continuous import Continuous

#: Seconds that a tenant with work waits for memory before others are drained.
PATIENCE_SECONDS = 5.0


def _returns(tenant: Tenant) -> tuple[float, float, float | None]:
    """After how many idle seconds all GPUs are given back (infinity: never), a container's start, requests a GPU."""
    settings = tenant.instances.settings
    keep_seconds = settings.keep_alive.seconds if tenant.instances.gives_back else math.inf
    return keep_seconds, settings.container_seconds, settings.requests_per_gpu


class GpuPool:
    """Tenants on the same GPUs.

    Args:
        tenants: fresh, at least one, all on the same cluster; several need continuous batching.
        patience_seconds: how long a tenant with work waits for memory before others are drained; infinity: for ever.
        queue: of the simulation that it is part of; None: one of its own.

    Attributes:
        now: until when it has been simulated; after the last request, when its last token came.
        memory: who is in it, with its accounts.
        scaling: how many GPUs are held; None where all are, or none.
        done: every request of every tenant has been served.

    Raises:
        UserError: no tenant, clusters or settings that differ, another batching, or a negative patience.
        RunFailed: a tenant does not fit into memory even alone.
    """

    def __init__(
        self, tenants: Sequence[Tenant], patience_seconds: float = PATIENCE_SECONDS, queue: EventQueue | None = None
    ) -> None:
        if not patience_seconds >= 0:
            raise UserError(f"a tenant's patience must be at least 0 seconds, got {patience_seconds}")
        if not tenants or any(tenant.cluster != tenants[0].cluster for tenant in tenants):
            raise UserError("a shared pool needs at least one tenant, and all tenants on the same cluster")
        if len(tenants) > 1 and not all(isinstance(tenant.scheduler, Continuous) for tenant in tenants):
            raise UserError("tenants of a shared pool are served with continuous batching")
        if any(_returns(tenant) != _returns(tenants[0]) for tenant in tenants):
            raise UserError(
                "tenants of a shared pool must agree on scale to zero, keep-alive, container start and GPUs"
            )
        self.tenants, self.cluster = tenants, tenants[0].cluster
        self.queue = EventQueue() if queue is None else queue
        self.now, self._idle, self.done = 0.0, 0.0, False
        self._keep, self._container, per_gpu = _returns(tenants[0])
        for tenant in tenants:
            tenant.join(self._event)
        self.scaling = None if per_gpu is None else Scaling(tenants, self._event)
        self.memory = SharedMemory(tenants, patience_seconds, self.scaling)
        self._turn, self._gpu_back = self._event(Kind.TURN), self._event(Kind.GPU_BACK)
        self._noticed = self._event(Kind.FAILURE_NOTICED)
        self._started, self._expired = self._event(Kind.CONTAINERS_STARTED), self._event(Kind.POOL_EXPIRED)
        # what has happened during an iteration, until when an interruption lasts, whether something was lost since, and
        # whose turn is next
        self._due: list[Event] = []
        self._resumes, self._lost, self._next_place = 0.0, False, 0
        # a copy is lost to its tenant; a GPU is lost once, however many runs name it, and to all
        for failure, only in dict.fromkeys(
            (f, t if f.layer is not None else None) for t in tenants for f in t.failures
        ):
            self._event(Kind.FAILURE, (failure, tenants if only is None else [only])).schedule(failure.seconds)
        for tenant in tenants:
            self._await_work(tenant)
        self._turn.schedule(0.0)

    def _event(self, kind: Kind, subject: Any = None) -> Event:
        return Event(self.queue, kind, self, subject)

    @property
    def gpu_seconds(self) -> float:
        """Sum over GPUs of the seconds so far for which each was held."""
        return self.tenants[0].instances.gpu_seconds(self.now)

    @property
    def resident_byte_seconds(self) -> float:
        """Of all tenants' expert copies, so far."""
        return sum(tenant.instances.resident_byte_seconds(self.now) for tenant in self.tenants)

    @property
    def _holds_any(self) -> bool:
        return bool(np.count_nonzero(self.tenants[0].instances.held_G))

    @property
    def _interrupted(self) -> bool:
        return self._resumes > self.now or self._noticed.waiting

    @property
    def _quiet(self) -> bool:
        """Whether no tenant has work or is being loaded."""
        return not any(tenant.has_work(self.now) or tenant.ready > self.now for tenant in self.tenants)

    def check(self) -> None:
        """Assert that all requests were served, and that tokens, memory and time were conserved.

        Raises:
            RunFailed: requests are left that the GPUs have no room for.
        """
        for tenant in self.tenants:
            if tenant.has_work(self.now):
                raise RunFailed(f"{tenant.spec.name} has work, and the GPUs that are left have no room for it")
        for tenant in self.tenants:
            tenant.clocks.check()
            tenant.instances.check()
            assert tenant.instances.gpu_seconds(self.now) == self.gpu_seconds, "a GPU was not held by all models alike"
        busy = sum(tenant.busy for tenant in self.tenants)
        assert math.isclose(self.now, busy + self._idle, rel_tol=1e-9, abs_tol=1e-9), "time was lost"

    def happen(self, event: Event) -> None:
        """Let an event take effect, at the latest when the iteration or interruption under way ends."""
        if event is not self._turn:
            self._due.append(event)
            if not self._turn.waiting:
                self._turn.schedule(max(self.now, event.seconds))
            return
        self._idle += event.seconds - self.now
        self.now = event.seconds
        due, self._due = sorted(self._due, key=lambda each: each.kind), []
        for each in due:
            self._take_effect(each)
        self._await_gpus()
        if self._interrupted:
            self._turn.schedule(max(self.now, self._resumes))
        elif self._lost:
            self._recover()
        else:
            self._go_on()

    def _take_effect(self, event: Event) -> None:
        tenant = event.subject
        if event.kind is Kind.GPU_BACK:
            back = [each.stage.gpus_back(self.now, each.awake) for each in self.tenants]
            if any(back):
                self.memory.look_again(self.now)
        elif event.kind is Kind.CONTAINERS_STARTED:
            for each in self.tenants:
                if each.awake:
                    each.stage.wake(self.now)
            self.memory.look_again(self.now)
        elif event.kind is Kind.FAILURE:
            self._fail(event)
        elif event.kind is Kind.FAILURE_NOTICED:
            self._fail_over(event)
        elif event.kind is Kind.MODEL_EXPIRED and tenant.awake and not tenant.has_work(self.now):
            self.memory.sleep(tenant, max(event.seconds, tenant.now))
        elif event.kind is Kind.POOL_EXPIRED and self._quiet:
            self._give_back()

    def _fail(self, event: Event) -> None:
        """A GPU or copy is lost, and nothing runs until that is noticed."""
        failure, hit = event.subject
        if self._interrupted:
            # one after the other
            self._due.append(event)
        elif not self.tenants[0].instances.held_G[failure.gpu]:
            # it hits a GPU that is somebody else's
            for tenant in hit:
                tenant.missed += 1
        else:
            self._interrupt("failure", failure.detection_seconds)
            self._noticed.subject = event.subject
            self._noticed.schedule(self._resumes)

    def _fail_over(self, event: Event) -> None:
        """Do without what was lost; where too few GPUs are left, others are taken and waited for before."""
        failure, hit = event.subject
        scaling = self.scaling if failure.layer is None else None
        if scaling is not None and (there := scaling.replace(failure.gpu, self.now)) > self.now:
            self._interrupt("container", there - self.now)
            self._resumes = there
            event.schedule(there)
            return
        for tenant in hit:
            self.memory.lose(tenant, failure, self.now)
        if scaling is not None:
            scaling.lose(failure.gpu, self.now, failure.seconds + failure.restart_seconds)
        self.memory.look_again(self.now)
        self._lost = True

    def _interrupt(self, cause: str, seconds: float) -> None:
        """Nothing runs for so long."""
        for tenant in self.tenants:
            tenant.waited(cause, self.now, seconds)
        self._resumes = self.now + seconds

    def _recover(self) -> None:
        """Compute lost KV caches again; who sleeps does so in its turn."""
        for tenant in self.tenants:
            if tenant.awake and tenant.owed:
                self.now = tenant.recover(self.now)
        self.memory.settle(self.now)
        self._lost = False
        self._turn.schedule(self.now)

    def _give_back(self) -> None:
        """Give all GPUs back."""
        for tenant in self.tenants:
            if tenant.awake and len(self.tenants) > 1:
                self.memory.sleep(tenant, self.now)
            elif tenant.awake:
                self.memory.empty(tenant, self.now)
            tenant.instances.hold(np.zeros(self.cluster.G, np.bool_), self.now)
            # others will be taken for those that are lost
            tenant.stage.gpus_back(math.inf, loads=False)

    def _start(self) -> None:
        """Take GPUs after all were given back."""
        if self.scaling is not None:
            self.scaling.wake(self.now)
        else:
            for tenant in self.tenants:
                tenant.instances.hold(np.ones(self.cluster.G, np.bool_), self.now)
        weights = sum(tenant.instances.restart_seconds for tenant in self.tenants if tenant.awake)
        self._interrupt("container", self._container + weights)
        self.tenants[0].instances.engine_free_G[:] = self._resumes
        self._started.schedule(self._resumes)
        self._turn.schedule(self._resumes)

    def _go_on(self) -> None:
        """Run the next iteration, or wait for the next event where there is none."""
        if not self._holds_any and any(tenant.has_work(self.now) for tenant in self.tenants):
            self._start()
            return
        if self.scaling is not None and self._holds_any:
            self._scale(self.scaling)
        count = len(self.tenants)
        places = [(self._next_place + step) % count for step in range(count)]
        place = next((at for at in places if self.memory.can_run(self.tenants[at], self.now)), None)
        self._await_gpus()
        if place is not None:
            self._next_place = place + 1
            self._iterate(self.tenants[place])
        elif not self._quiet:
            self._expired.cancel()
        elif self._holds_any and not self._expired.waiting:
            self._expired.schedule(self.now + self._keep)
        self.done = place is None and all(tenant.scheduler.done for tenant in self.tenants)

    def _scale(self, scaling: Scaling) -> None:
        """Hold as many GPUs as are needed."""
        down_G = scaling.outage.down_G.copy()
        scaling.adapt(self.now)
        if (down_G != scaling.outage.down_G).any():
            self.memory.look_again(self.now)
            self.memory.settle(self.now)

    def _iterate(self, tenant: Tenant) -> None:
        """Have a tenant's next iteration, or steady decode steps until something happens or another has work."""
        self._expired.cancel()
        tenant.expired.cancel()
        if tenant.owed:
            self.now = tenant.recover(self.now)
        else:
            busy = any(other.has_work(self.now) for other in self.tenants if other is not tenant)
            self.now = tenant.serve(self.now, self.now if busy else self.queue.next_time())
            # its KV cache or copies may have grown into memory that others hold
            self.memory.settle(self.now)
        if not tenant.has_work(self.now):
            self._await_work(tenant)
        self._turn.schedule(self.now)

    def _await_gpus(self) -> None:
        self._gpu_back.schedule(self.tenants[0].stage.outage.next_return)

    def _await_work(self, tenant: Tenant) -> None:
        """A tenant without work waits for its next request, and sleeps where others share GPUs that are given back."""
        arrival = tenant.scheduler.next_arrival(self.now)
        if arrival is not None and arrival > self.now:
            tenant.arrival.schedule(arrival)
        if self.scaling is not None and len(self.tenants) > 1 and tenant.awake:
            tenant.expired.schedule(tenant.idle_from + self._keep)
