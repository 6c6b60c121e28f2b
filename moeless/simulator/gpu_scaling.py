"""How many GPUs of a pool are held, for one model or for several that share them.

One is held for so many requests, and as many as memory needs; the others are given back.
A GPU that has not been needed for a keep-alive is *closed*: requests that begin keep their KV cache elsewhere. Once
the last of its own has ended its copies are loaded on the GPUs that stay, while it still serves; then it is given back.
When more are needed closed GPUs are opened, and after them others taken: such a one is held from the moment its
container begins to start, and serves when this and the non-expert weights are there. A lost GPU is given back at once,
and cannot be taken until it has restarted.

Axes: G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from moeless.contracts import BoolArray, FloatArray
from moeless.simulator.events import Event, Kind
from moeless.simulator.tenants import Tenant

#: Room that is kept for KV caches to grow, relative to those there are.
KV_GROWTH = 1.25


class Scaling:
    """The GPUs of all models of a pool.

    Args:
        tenants: at least one, all on the same GPUs, whose settings ask for the same requests per GPU.
        event: makes an event of the pool.

    Attributes:
        there_from: when the GPU that was taken last is, or was, there.
    """

    def __init__(self, tenants: Sequence[Tenant], event: Callable[[Kind], Event]) -> None:
        self.tenants, self.instances, self.outage = tenants, tenants[0].instances, tenants[0].stage.outage
        for tenant in tenants:
            # whatever is closed, or on its way, is so for all
            tenant.stage.outage.closed_G = self.outage.closed_G
            tenant.stage.outage.back_at_G = self.outage.back_at_G
        settings = self.instances.settings
        assert settings.requests_per_gpu is not None
        self._per_gpu, keep = settings.requests_per_gpu, settings.keep_alive
        self._keep = math.inf if keep.kind == "lru" else keep.seconds
        self.there_from, self._event, self._wakes = 0.0, event, 0
        self._available_from_G = np.zeros(self.instances.cluster.G)
        # awaited while fewer are needed than are open; and how many were needed meanwhile at most
        self._unneeded, self._peak = event(Kind.GPUS_UNNEEDED), 0
        # awaited while copies of these GPUs are being loaded elsewhere
        self._moved, self._leaving_G = event(Kind.COPIES_MOVED), np.zeros(self.instances.cluster.G, np.bool_)

    @property
    def _coming_G(self) -> BoolArray:
        return np.asarray(self.instances.held_G & self.outage.down_G)

    @property
    def coming(self) -> bool:
        """Whether GPUs have been taken that are not there yet."""
        return bool(self._coming_G.any())

    @property
    def _open_G(self) -> BoolArray:
        return np.asarray(self.instances.held_G & ~self.outage.closed_G)

    def _kv_bytes_G(self) -> FloatArray:
        """What all KV caches take on each GPU; who sleeps has given them up."""
        return sum((each.kv_bytes_G() for each in self.tenants if each.awake), np.zeros(self.instances.cluster.G))

    def _fewest(self, kv_bytes: float, now: float) -> int:
        """GPUs that memory needs: for one copy of every expert, the extras of a plan, and the KV caches."""
        alone, cluster = len(self.tenants) == 1, self.instances.cluster
        counted = [each for each in self.tenants if alone or each.needs_room(now)]
        # what one leaves free is less by what the others' other weights take
        taken = max(0, len(counted) - 1) * float(cluster.device.memory_bytes)
        room = sum(float(each.instances.room_G.min()) for each in counted) - taken
        for gpus in range(1, cluster.G):
            if sum(each.even_bytes(gpus) for each in counted) + KV_GROWTH * kv_bytes / gpus <= room:
                return gpus
        return cluster.G

    def _need(self, kv_bytes: float, now: float) -> int:
        """GPUs that the running and waiting requests need."""
        requests = sum(each.demand(now) for each in self.tenants)
        return min(self.instances.cluster.G, max(math.ceil(requests / self._per_gpu), self._fewest(kv_bytes, now)))

    def adapt(self, now: float) -> None:
        """Close, give back, open and take GPUs, as requests and their KV caches need at ``now``."""
        kv_bytes_G, wakes = self._kv_bytes_G(), sum(each.wakes for each in self.tenants)
        if wakes > self._wakes:
            # copies of models that were woken may be on GPUs that are about to leave
            self._wakes = wakes
            self.stay()
        if now >= self._moved.seconds and kv_bytes_G[self._leaving_G].any():
            # requests began there after all: no other was open for a moment
            self.stay()
        elif now >= self._moved.seconds:
            self._leave(now)
        need, there = self._need(float(kv_bytes_G.sum()), now), int(self._open_G.sum())
        if need < there:
            if math.isinf(self._unneeded.seconds):
                self._peak = need
                self._unneeded.schedule(now + self._keep)
            self._peak = max(self._peak, need)
            if now >= self._unneeded.seconds:
                self._close(there - self._peak, kv_bytes_G)
                self._unneeded.cancel()
        else:
            self._unneeded.cancel()
            self._grow(need - there, now)
        empty_G = self.outage.closed_G & self.instances.held_G & (kv_bytes_G == 0)
        if empty_G.any() and not self._leaving_G.any():
            moved_at = self._load_elsewhere(empty_G, now)
            if math.isinf(moved_at):
                # the others have no room for its copies
                self.outage.closed_G[empty_G] = False
            else:
                self._leaving_G = empty_G
                self._moved.schedule(moved_at)

    def _close(self, count: int, kv_bytes_G: FloatArray) -> None:
        """Close the working GPUs with the least to wait for."""
        working = np.flatnonzero(self._open_G & ~self.outage.down_G)
        last_first = working[np.lexsort((-working, kv_bytes_G[working]))]
        self.outage.closed_G[last_first[: min(count, len(working) - 1)]] = True

    def _load_elsewhere(self, leaving_G: BoolArray, now: float) -> float:
        """Load what is on GPUs that are to leave on the others; when it is there, infinity where there is no room."""
        awake = [each for each in self.tenants if each.awake]
        if len(awake) > 1:
            # each model knows its own copies only
            held_G = np.sum([each.bytes_without(leaving_G) for each in awake], axis=0)
            if (held_G > self.instances.cluster.device.memory_bytes)[~self.outage.down_G & ~leaving_G].any():
                return math.inf
        ready = [each.stage.load_beside(list(each.stage.plans), now, leaving_G) for each in awake]
        return max(ready, default=now)

    def _leave(self, now: float) -> None:
        for each in self.tenants:
            each.stage.leave(self._leaving_G, now)
            if each.awake:
                each.stage.reload("leaving", now)
        self._hold(self.instances.held_G & ~self._leaving_G, now)
        self.outage.closed_G[self._leaving_G] = False
        self.stay()

    def _hold(self, held_G: BoolArray, now: float) -> None:
        for each in self.tenants:
            each.instances.hold(held_G, now)

    def stay(self) -> None:
        """No GPU leaves for now; those that are closed and empty begin once more."""
        self._leaving_G = np.zeros_like(self._leaving_G)
        self._moved.cancel()

    def _grow(self, count: int, now: float) -> None:
        closed = np.flatnonzero(self.outage.closed_G)[:count]
        if len(closed):
            self.outage.closed_G[closed] = False
            # who was leaving may be among them
            self.stay()
        self._take(count - len(closed), now)

    def _take(self, count: int, now: float) -> None:
        """Take so many GPUs more, or as many as there are."""
        taken = np.flatnonzero(~self.instances.held_G & (self._available_from_G <= now))[: max(0, count)]
        if not len(taken):
            return
        held_G = self.instances.held_G.copy()
        held_G[taken] = True
        self._hold(held_G, now)
        weights = sum(each.instances.restart_seconds for each in self.tenants if each.awake)
        there = now + (self.instances.settings.container_seconds + weights)
        self.outage.back_at_G[taken] = self.instances.engine_free_G[taken] = self.there_from = there

    def more(self, now: float) -> None:
        """Have another GPU come where none is on its way."""
        if not self.coming:
            self._take(1, now)

    def replace(self, gpu: int, now: float) -> float:
        """Have as many GPUs come as the others are too few without one that is lost; returns when these are there."""
        others_G = ~self.outage.down_G
        others_G[gpu] = False
        missing = self._fewest(float(self._kv_bytes_G().sum()), now) - int(others_G.sum())
        if missing <= 0:
            return now
        self._take(missing - int(self._coming_G.sum()), now)
        there_at = np.sort(self.outage.back_at_G[self._coming_G])[:missing]
        return float(there_at.max(initial=now))

    def lose(self, gpu: int, now: float, available_from: float) -> None:
        """A GPU was lost: it is given back, and may be taken again at ``available_from``."""
        held_G = self.instances.held_G.copy()
        held_G[gpu] = False
        self._hold(held_G, now)
        self._available_from_G[gpu] = available_from
        self._event(Kind.GPU_AVAILABLE).schedule(available_from)
        self.outage.back_at_G[gpu] = math.inf
        self.outage.closed_G[gpu] = False
        self.stay()

    def wake(self, now: float) -> None:
        """After all were given back: take as many as the requests need."""
        self.outage.closed_G[:] = False
        self.stay()
        self._unneeded.cancel()
        taken_G = np.arange(self.instances.cluster.G) < self._need(0.0, now)
        self._hold(taken_G, now)
        self.outage.back_at_G[:] = math.inf
        for each in self.tenants:
            each.stage.outage.down_G[:] = ~taken_G
            for gpu, taken in enumerate(taken_G.tolist()):
                each.instances.set_down(gpu, not taken)
