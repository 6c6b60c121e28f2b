"""A rank's expert copies: slots under a budget, loaded in the background, used when complete.

A slot holds one copy. A copy is *loading* from the moment it is asked for and *ready* once all its bytes are there;
unplanned copies stay until their keep-alive runs out or their slot is needed (least recently planned first).

Axes: L layers, C slots of one layer.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moeless.engine.hostmem import HostExperts
from moeless.errors import RunFailed


@dataclass
class Copy:
    """One expert copy in a slot; ``done`` is set when it is ready or has failed."""

    expert: int
    slot: int
    born: float
    used: float
    planned: bool = True
    done: threading.Event = field(default_factory=threading.Event)
    error: str | None = None
    event: Any = None

    @property
    def ready(self) -> bool:
        """All bytes are there."""
        return self.done.is_set() and self.error is None and (self.event is None or self.event.query())


@dataclass
class StoreCounts:
    """Accounts since the last deployment."""

    loads: int = 0
    moved_bytes: int = 0
    evictions: int = 0
    refused: int = 0
    failed: int = 0
    resident_byte_seconds: float = 0.0


class ReplicaStore:
    """Copies of one rank.

    Args:
        slots: places per layer: the budget's replicas and the spare ones that keep-alive uses.
        keep_alive: seconds that an unplanned copy stays.
    """

    def __init__(self, host: HostExperts, layers: int, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        self.host, self.num_slots, self.device = host, slots, device
        self.slots_L = [
            {name: torch.zeros((slots, *shape), dtype=dtype, device=device) for name, shape in host.shapes.items()}
            for _ in range(layers)
        ]
        self._copies_L: list[dict[int, Copy]] = [{} for _ in range(layers)]
        self.keep_alive = 0.0
        self.counts = StoreCounts()
        self._queue: queue.SimpleQueue[tuple[int, Copy] | None] = queue.SimpleQueue()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = threading.Thread(target=self._load_all, name="expert-copies", daemon=True)
        self._thread.start()

    def _load_all(self) -> None:
        while (item := self._queue.get()) is not None:
            layer, copy = item
            try:
                self._load(layer, copy)
            except (RuntimeError, MemoryError) as error:
                copy.error = str(error).splitlines()[0]
            copy.done.set()

    def _load(self, layer: int, copy: Copy) -> None:
        weights = self.host.view(layer, copy.expert)
        if self._stream is None:
            for name, value in weights.items():
                self.slots_L[layer][name][copy.slot].copy_(value)
            return
        with torch.cuda.stream(self._stream):
            for name, value in weights.items():
                self.slots_L[layer][name][copy.slot].copy_(value, non_blocking=True)
            copy.event = self._stream.record_event()

    def deploy(self, experts_L: Sequence[Sequence[int]], keep_alive: float, now: float) -> None:
        """Empty the store, load these copies and wait for them; accounts start anew."""
        self._drain()
        self.keep_alive = keep_alive
        self._copies_L = [{} for _ in experts_L]
        self.counts = StoreCounts()
        for layer, experts in enumerate(experts_L):
            self.provision(layer, experts, now)
        for layer, experts in enumerate(experts_L):
            for expert in experts:
                self.wait(layer, expert)
        self.counts.loads = self.counts.moved_bytes = 0

    def _drain(self) -> None:
        for copies in self._copies_L:
            for copy in copies.values():
                copy.done.wait()

    def provision(self, layer: int, experts: Sequence[int], now: float) -> None:
        """Make these the layer's planned copies: load what is missing, let the rest grow old.

        A copy that failed to load is asked for again. Where no slot is free, the copy is refused and counted.
        """
        copies, wanted = self._copies_L[layer], set(experts)
        for copy in list(copies.values()):
            if copy.planned and copy.expert not in wanted:
                copy.planned, copy.used = False, now
            elif copy.done.is_set() and copy.error is not None:
                self.counts.failed += 1
                self._evict(layer, copy, now)
            elif copy.expert not in wanted and now - copy.used >= self.keep_alive and copy.done.is_set():
                self._evict(layer, copy, copy.used + self.keep_alive)
        for expert in sorted(wanted):
            if expert in copies:
                copies[expert].planned, copies[expert].used = True, now
                continue
            slot = self._free_slot(layer, now)
            if slot is None:
                self.counts.refused += 1
                continue
            copy = copies[expert] = Copy(expert, slot, now, now)
            self.counts.loads += 1
            self.counts.moved_bytes += self.host.expert_bytes
            self._queue.put((layer, copy))

    def _free_slot(self, layer: int, now: float) -> int | None:
        copies = self._copies_L[layer]
        taken = {copy.slot for copy in copies.values()}
        for slot in range(self.num_slots):
            if slot not in taken:
                return slot
        idle = [copy for copy in copies.values() if not copy.planned]
        if not idle:
            return None
        oldest = min(idle, key=lambda copy: (not copy.done.is_set(), copy.used, copy.slot))
        oldest.done.wait()
        self._evict(layer, oldest, now)
        return oldest.slot

    def _evict(self, layer: int, copy: Copy, when: float) -> None:
        del self._copies_L[layer][copy.expert]
        self.counts.evictions += 1
        self.counts.resident_byte_seconds += self.host.expert_bytes * max(0.0, when - copy.born)

    def ready(self, layer: int, expert: int) -> bool:
        """Whether this rank may serve the expert now."""
        copy = self._copies_L[layer].get(expert)
        return copy is not None and copy.ready

    def wait(self, layer: int, expert: int) -> float:
        """Block until a copy is complete; the seconds that took.

        Raises:
            RunFailed: there is no such copy and no room for one, or its weights cannot be loaded.
        """
        started = time.perf_counter()
        copy = self._copies_L[layer].get(expert)
        if copy is None:
            slot = self._free_slot(layer, started)
            if slot is None:
                raise RunFailed(f"no memory for expert {expert} of layer {layer}; use fewer extra slots or more ranks")
            copy = self._copies_L[layer][expert] = Copy(expert, slot, started, started)
            self._queue.put((layer, copy))
        copy.done.wait()
        if copy.error is not None:
            raise RunFailed(f"expert {expert} of layer {layer} cannot be loaded: {copy.error}")
        if copy.event is not None:
            copy.event.synchronize()
        return time.perf_counter() - started

    def slot_of_expert(self, layer: int) -> Mapping[int, int]:
        """Slots of this rank's ready copies."""
        return {expert: copy.slot for expert, copy in self._copies_L[layer].items() if copy.ready}

    def resident(self, layer: int) -> int:
        """Copies in memory or on their way."""
        return len(self._copies_L[layer])

    def settle(self, now: float) -> StoreCounts:
        """The accounts up to ``now``, copies that are still there included."""
        counts = StoreCounts(**self.counts.__dict__)
        for copies in self._copies_L:
            for copy in copies.values():
                until = now if copy.planned else min(now, copy.used + self.keep_alive)
                counts.resident_byte_seconds += self.host.expert_bytes * max(0.0, until - copy.born)
        return counts

    def close(self) -> None:
        """End the loading thread."""
        self._queue.put(None)
        self._thread.join()
