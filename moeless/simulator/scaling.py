"""How many GPUs a run holds: one for so many requests, and as many as memory needs; the others are given back.

A GPU that has not been needed for a keep-alive is *closed*: requests that begin keep their KV cache elsewhere. Once
the last of its own has ended its copies are loaded on the GPUs that stay, while it still serves; then it is given back.
When more are needed closed GPUs are opened, and after them others taken: such a one is held from the moment its
container begins to start, and serves when this and the non-expert weights are there. A lost GPU is given back at once,
and cannot be taken until it has restarted.

Axes: G GPUs.
"""

from __future__ import annotations

import math

import numpy as np

from moeless.contracts import BoolArray, FloatArray
from moeless.serverless import InstancePool
from moeless.simulator.stage import Stage

#: Room that is kept for KV caches to grow, relative to those there are.
KV_GROWTH = 1.25


class Scaling:
    """The GPUs of one run.

    Args:
        stage: whose plans leave GPUs, and come back to them.
        pool: whose GPUs they are; ``pool.settings.requests_per_gpu`` is given.
        extra_slots: copies of a layer on a GPU beyond even primaries.
    """

    def __init__(self, stage: Stage, pool: InstancePool, extra_slots: int) -> None:
        assert pool.settings.requests_per_gpu is not None
        self.stage, self.pool, self.outage = stage, pool, stage.outage
        self._per_gpu, self._extra_slots = pool.settings.requests_per_gpu, extra_slots
        keep = pool.settings.keep_alive
        self._keep = math.inf if keep.kind == "lru" else keep.seconds
        self._free_from_G = np.zeros(pool.cluster.G)
        # since when fewer were needed than are open, and how many at most
        self._since, self._peak = math.inf, 0
        # GPUs whose copies are being loaded elsewhere, and when these are there
        self._leaving_G, self._leave_at = np.zeros(pool.cluster.G, np.bool_), math.inf

    @property
    def next_event(self) -> float:
        """When :meth:`adapt` is wanted next, whatever the requests do."""
        return min(self._since + self._keep, self._leave_at)

    @property
    def _open_G(self) -> BoolArray:
        return np.asarray(self.pool.held_G & ~self.outage.closed_G)

    def fewest(self, kv_bytes: float) -> int:
        """GPUs that memory needs: for one copy of every expert, the extras of a plan, and the KV caches."""
        spec, room = self.pool.spec, float(self.pool.room_G.min())
        for gpus in range(1, self.pool.cluster.G):
            copies = spec.L * (-(-spec.E // gpus) + self._extra_slots)
            if copies * float(spec.expert_bytes) + KV_GROWTH * kv_bytes / gpus <= room:
                return gpus
        return self.pool.cluster.G

    def need(self, requests: int, kv_bytes: float) -> int:
        """GPUs that so many running and waiting requests need."""
        return min(self.pool.cluster.G, max(math.ceil(requests / self._per_gpu), self.fewest(kv_bytes)))

    def adapt(self, now: float, requests: int, kv_bytes_G: FloatArray) -> None:
        """Close, give back, open and take GPUs, as ``requests`` and their KV caches need at ``now``."""
        if now >= self._leave_at and kv_bytes_G[self._leaving_G].any():
            # requests began there after all: no other was open for a moment
            self._stay()
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
            self._leave_at = self.stage.load_beside(list(self.stage.plans), now, empty_G)
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

    def _leave(self, now: float) -> None:
        self.stage.leave(self._leaving_G, now)
        self.pool.hold(self.pool.held_G & ~self._leaving_G, now)
        self.outage.closed_G[self._leaving_G] = False
        self._stay()

    def _stay(self) -> None:
        self._leaving_G, self._leave_at = np.zeros_like(self._leaving_G), math.inf

    def _grow(self, count: int, now: float) -> None:
        closed = np.flatnonzero(self.outage.closed_G)[:count]
        if len(closed):
            self.outage.closed_G[closed] = False
            # who was leaving may be among them; those that are not begin once more
            self._stay()
        self.take(count - len(closed), now)

    def take(self, count: int, now: float) -> int:
        """Take so many GPUs more, or as many as there are; returns how many."""
        taken = np.flatnonzero(~self.pool.held_G & (self._free_from_G <= now))[: max(0, count)]
        held_G = self.pool.held_G.copy()
        held_G[taken] = True
        self.pool.hold(held_G, now)
        self.outage.back_at_G[taken] = self.pool.engine_free_G[taken] = now + self.pool.wake_seconds
        return len(taken)

    def replace(self, gpu: int, kv_bytes: float, now: float) -> float:
        """Have as many GPUs come as the others are too few without one that is lost; returns when these are there."""
        others_G = ~self.outage.down_G
        others_G[gpu] = False
        missing = self.fewest(kv_bytes) - int(others_G.sum())
        if missing <= 0:
            return now
        self.take(missing - int((self.pool.held_G & self.outage.down_G).sum()), now)
        coming_G = self.pool.held_G & self.outage.down_G
        there_at = np.sort(self.outage.back_at_G[coming_G])[:missing]
        return float(there_at.max(initial=now))

    def lost(self, gpu: int, now: float, back_at: float) -> None:
        """A GPU was lost: it is given back, and there again to be taken at ``back_at``."""
        held_G = self.pool.held_G.copy()
        held_G[gpu] = False
        self.pool.hold(held_G, now)
        self._free_from_G[gpu] = back_at
        self.outage.back_at_G[gpu] = math.inf
        self.outage.closed_G[gpu] = False
        self._stay()

    def wake(self, now: float, requests: int) -> None:
        """After all were given back: take as many as the requests need."""
        self.outage.closed_G[:] = False
        self._stay()
        self._since = math.inf
        taken_G = np.arange(self.pool.cluster.G) < self.need(requests, 0.0)
        self.pool.hold(taken_G, now)
        for gpu, taken in enumerate(taken_G.tolist()):
            self.outage.down_G[gpu], self.outage.back_at_G[gpu] = not taken, math.inf
            self.pool.set_down(gpu, not taken)
