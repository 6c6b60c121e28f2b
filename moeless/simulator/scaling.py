"""How many GPUs are held, for one model or for several that share them.

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
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeless.contracts import BoolArray, FloatArray
from moeless.serverless import InstancePool
from moeless.simulator.stage import Stage

#: Room that is kept for KV caches to grow, relative to those there are.
KV_GROWTH = 1.25


@dataclass
class Member:
    """One of the models.

    Attributes:
        stage: whose plans leave GPUs, and come back to them.
        pool: where its copies are.
        extra_slots: copies of a layer on a GPU beyond even primaries.
        awake: its copies are in memory, or on their way.
        counts: room for it has to be held.
    """

    stage: Stage
    pool: InstancePool
    extra_slots: int
    awake: bool = True
    counts: bool = True

    def even_bytes(self, gpus: int) -> float:
        """Bytes of its copies on one of so many GPUs, evenly laid out."""
        spec = self.pool.spec
        return spec.L * (-(-spec.E // gpus) + self.extra_slots) * float(spec.expert_bytes)

    def bytes_without(self, leaving_G: BoolArray) -> FloatArray:
        """Bytes that it takes on each GPU once it has left some."""
        plans = [self.stage.outage.evacuate(plan, leaving_G) for plan in self.stage.plans]
        pool = self.pool
        return pool.bytes_of(plans) + float(pool.spec.non_expert_bytes) + (pool.room_G - pool.capacity_G)


class Scaling:
    """The GPUs of all members.

    Args:
        members: at least one, all on the same GPUs; ``pool.settings.requests_per_gpu`` is given, and the same.

    Attributes:
        there_from: when the GPU that was taken last is, or was, there.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members, self.pool, self.outage = members, members[0].pool, members[0].stage.outage
        for member in members:
            # whatever is closed, or on its way, is so for all
            member.stage.outage.closed_G = self.outage.closed_G
            member.stage.outage.back_at_G = self.outage.back_at_G
        pool = self.pool
        assert pool.settings.requests_per_gpu is not None
        self._per_gpu, keep = pool.settings.requests_per_gpu, pool.settings.keep_alive
        self._keep = math.inf if keep.kind == "lru" else keep.seconds
        self.there_from = 0.0
        self._free_from_G = np.zeros(pool.cluster.G)
        # since when fewer were needed than are open, and how many at most
        self._since, self._peak = math.inf, 0
        # GPUs whose copies are being loaded elsewhere, and when these are there
        self._leaving_G, self._leave_at = np.zeros(pool.cluster.G, np.bool_), math.inf

    @property
    def next_event(self) -> float:
        """When :meth:`adapt` is wanted next, whatever the requests do."""
        return min(self._since + self._keep, self._leave_at, self.outage.next_return)

    def next_free(self, now: float) -> float:
        """When the next of the lost GPUs may be taken again; infinity where none is awaited."""
        return float(self._free_from_G[~self.pool.held_G & (self._free_from_G > now)].min(initial=math.inf))

    @property
    def _coming_G(self) -> BoolArray:
        return np.asarray(self.pool.held_G & self.outage.down_G)

    @property
    def coming(self) -> bool:
        """Whether GPUs have been taken that are not there yet."""
        return bool(self._coming_G.any())

    @property
    def _open_G(self) -> BoolArray:
        return np.asarray(self.pool.held_G & ~self.outage.closed_G)

    def fewest(self, kv_bytes: float) -> int:
        """GPUs that memory needs: for one copy of every expert, the extras of a plan, and the KV caches."""
        counted = [member for member in self.members if member.counts]
        # what one leaves free is less by what the others' other weights take
        memory = float(self.pool.cluster.device.memory_bytes)
        room = sum(float(member.pool.room_G.min()) for member in counted) - max(0, len(counted) - 1) * memory
        for gpus in range(1, self.pool.cluster.G):
            copies = sum(member.even_bytes(gpus) for member in counted)
            if copies + KV_GROWTH * kv_bytes / gpus <= room:
                return gpus
        return self.pool.cluster.G

    def need(self, requests: int, kv_bytes: float) -> int:
        """GPUs that so many running and waiting requests need."""
        return min(self.pool.cluster.G, max(math.ceil(requests / self._per_gpu), self.fewest(kv_bytes)))

    def adapt(self, now: float, requests: int, kv_bytes_G: FloatArray) -> None:
        """Close, give back, open and take GPUs, as ``requests`` and their KV caches need at ``now``."""
        if now >= self._leave_at and kv_bytes_G[self._leaving_G].any():
            # requests began there after all: no other was open for a moment
            self.stay()
        elif now >= self._leave_at:
            self._leave(now)
        need, there = self.need(requests, float(kv_bytes_G.sum())), int(self._open_G.sum())
        if need < there:
            if math.isinf(self._since):
                self._since, self._peak = now, need
            self._peak = max(self._peak, need)
            if now >= self._since + self._keep:
                self._close(there - self._peak, kv_bytes_G)
                self._since = math.inf
        else:
            self._since = math.inf
            self._grow(need - there, now)
        empty_G = self.outage.closed_G & self.pool.held_G & (kv_bytes_G == 0)
        if empty_G.any() and not self._leaving_G.any():
            self._leave_at = self._load_elsewhere(empty_G, now)
            if math.isinf(self._leave_at):
                # the others have no room for its copies
                self.outage.closed_G[empty_G] = False
            else:
                self._leaving_G = empty_G

    def _close(self, count: int, kv_bytes_G: FloatArray) -> None:
        """Close the working GPUs with the least to wait for."""
        working = np.flatnonzero(self._open_G & ~self.outage.down_G)
        last_first = working[np.lexsort((-working, kv_bytes_G[working]))]
        self.outage.closed_G[last_first[: min(count, len(working) - 1)]] = True

    def _load_elsewhere(self, leaving_G: BoolArray, now: float) -> float:
        """Load what is on GPUs that are to leave on the others; when it is there, infinity where there is no room."""
        awake = [member for member in self.members if member.awake]
        if len(awake) > 1:
            # each pool knows its own copies only
            held_G = np.sum([each.bytes_without(leaving_G) for each in awake], axis=0)
            if (held_G > self.pool.cluster.device.memory_bytes)[~self.outage.down_G & ~leaving_G].any():
                return math.inf
        ready = [each.stage.load_beside(list(each.stage.plans), now, leaving_G) for each in awake]
        return max(ready, default=now)

    def _leave(self, now: float) -> None:
        for member in self.members:
            member.stage.leave(self._leaving_G, now)
            if member.awake:
                member.stage.reload("leaving", now)
        self._hold(self.pool.held_G & ~self._leaving_G, now)
        self.outage.closed_G[self._leaving_G] = False
        self.stay()

    def _hold(self, held_G: BoolArray, now: float) -> None:
        for member in self.members:
            member.pool.hold(held_G, now)

    def stay(self) -> None:
        """No GPU leaves for now; those that are closed and empty begin once more."""
        self._leaving_G, self._leave_at = np.zeros_like(self._leaving_G), math.inf

    def _grow(self, count: int, now: float) -> None:
        closed = np.flatnonzero(self.outage.closed_G)[:count]
        if len(closed):
            self.outage.closed_G[closed] = False
            # who was leaving may be among them
            self.stay()
        self.take(count - len(closed), now)

    def take(self, count: int, now: float) -> int:
        """Take so many GPUs more, or as many as there are; returns how many."""
        taken = np.flatnonzero(~self.pool.held_G & (self._free_from_G <= now))[: max(0, count)]
        if not len(taken):
            return 0
        held_G = self.pool.held_G.copy()
        held_G[taken] = True
        self._hold(held_G, now)
        weights = sum(member.pool.restart_seconds for member in self.members if member.awake)
        there = now + (self.pool.settings.container_seconds + weights)
        self.outage.back_at_G[taken] = self.pool.engine_free_G[taken] = self.there_from = there
        return len(taken)

    def more(self, now: float) -> None:
        """Have another GPU come where none is on its way."""
        if not self.coming:
            self.take(1, now)

    def replace(self, gpu: int, kv_bytes: float, now: float) -> float:
        """Have as many GPUs come as the others are too few without one that is lost; returns when these are there."""
        others_G = ~self.outage.down_G
        others_G[gpu] = False
        missing = self.fewest(kv_bytes) - int(others_G.sum())
        if missing <= 0:
            return now
        self.take(missing - int(self._coming_G.sum()), now)
        there_at = np.sort(self.outage.back_at_G[self._coming_G])[:missing]
        return float(there_at.max(initial=now))

    def lost(self, gpu: int, now: float, back_at: float) -> None:
        """A GPU was lost: it is given back, and there again to be taken at ``back_at``."""
        held_G = self.pool.held_G.copy()
        held_G[gpu] = False
        self._hold(held_G, now)
        self._free_from_G[gpu] = back_at
        self.outage.back_at_G[gpu] = math.inf
        self.outage.closed_G[gpu] = False
        self.stay()

    def wake(self, now: float, requests: int) -> None:
        """After all were given back: take as many as the requests need."""
        self.outage.closed_G[:] = False
        self.stay()
        self._since = math.inf
        taken_G = np.arange(self.pool.cluster.G) < self.need(requests, 0.0)
        self._hold(taken_G, now)
        self.outage.back_at_G[:] = math.inf
        for member in self.members:
            member.stage.outage.down_G[:] = ~taken_G
            for gpu, taken in enumerate(taken_G.tolist()):
                member.pool.set_down(gpu, not taken)
