"""A rank's expert copies: slots under a budget, filled in the background, used when complete.

A slot holds one copy. A copy is *loading* from the moment it is asked for and *ready* once all its bytes are there;
unplanned copies stay until their keep-alive runs out or their slot is needed (least recently planned first). A copy
that another rank is being sent stays until that is done.

Axes: L layers, E experts, C slots of one layer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moeless.contracts import BoolArray
from moeless.engine.hostmem import HostExperts
from moeless.engine.moves import Move
from moeless.engine.transfers import Copy, Transfers
from moeless.errors import RunFailed
from moeless.serverless import KeepAlive
from moeless.serverless.keep_alive import NUM_BINS
from moeless.serverless.kernels import learn


@dataclass
class StoreCounts:
    """Accounts since the last deployment; ``peer_loads`` of the loads were asked of another rank."""

    loads: int = 0
    peer_loads: int = 0
    peer_failures: int = 0
    moved_bytes: int = 0
    evictions: int = 0
    refused: int = 0
    failed: int = 0
    resident_byte_seconds: float = 0.0


class ReplicaStore:
    """Copies of one rank.

    Args:
        slots: places per layer: the budget's replicas and the spare ones that keep-alive uses.
        least: places per layer without which nothing can be served; where memory lacks room for ``slots``, as many
            as fit, and copies that find no place are refused.
        room_bytes: memory that the slots may take; None asks the device for all of them. Where a control group has a
            limit, asking for more than there is ends the process.
        rank, group: this rank, and the process group on which copies travel between ranks; None: host memory only.

    Raises:
        RunFailed: not even ``least`` slots fit in the device's memory.
    """

    def __init__(
        self,
        host: HostExperts,
        layers: int,
        slots: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        least: int | None = None,
        room_bytes: int | None = None,
        rank: int = 0,
        group: Any = None,
    ) -> None:
        self.host, self.device, self.rank = host, device, rank
        least = slots if least is None else least
        most = slots if room_bytes is None else min(slots, room_bytes // (layers * host.expert_bytes))
        self.slots_L = _allocate(host, layers, most, least, device, dtype)
        self.num_slots = len(next(iter(self.slots_L[0].values())))
        self._copies_L: list[dict[int, Copy]] = [{} for _ in range(layers)]
        self.keep_alive = KeepAlive("fixed", 0.0)
        self.counts, self._now = StoreCounts(), 0.0
        self.transfers = Transfers(host, self.slots_L, device, group)

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return len(self.slots_L)

    def tensors(self) -> list[torch.Tensor]:
        """Everything that the store allocated on this rank."""
        return [*(slots for layer in self.slots_L for slots in layer.values()), *self.transfers.stages]

    def deploy(self, experts_L: Sequence[Sequence[int]], keep_alive: KeepAlive, now: float) -> None:
        """Empty the store, load these copies and wait for them; accounts start anew."""
        for copies in self._copies_L:
            for copy in copies.values():
                copy.done.wait()
                for sent in copy.sends:
                    sent.wait()
        self.keep_alive = keep_alive
        layers, experts = len(experts_L), self.host.num_experts
        self._keep_LE = np.full((layers, experts), np.inf if keep_alive.kind == "lru" else keep_alive.seconds)
        self._gaps_LEB = np.zeros((layers, experts, NUM_BINS) if keep_alive.kind == "adaptive" else (0,) * 3, np.int64)
        # when a plan last dropped an expert; negative: never
        self._dropped_LE = np.full((layers, experts), -1.0)
        self._copies_L = [{} for _ in experts_L]
        self.counts, self.transfers.peer_failures = StoreCounts(), 0
        for layer, wanted in enumerate(experts_L):
            self.provision(layer, wanted, now)
        for layer, wanted in enumerate(experts_L):
            for expert in wanted:
                self.wait(layer, expert)
        self.counts.loads = self.counts.moved_bytes = 0

    def provision(self, layer: int, experts: Sequence[int], now: float, moves: Sequence[Move] = ()) -> None:
        """Make these the layer's planned copies: load what is missing, let the rest grow old.

        A copy that failed to load is asked for again. Where no slot is free, the copy is refused and counted.

        Args:
            moves: all ranks' moves of this plan; what is missing here and in no move comes from host memory.
        """
        copies, wanted, self._now = self._copies_L[layer], set(experts), now
        for copy in list(copies.values()):
            if copy.done.is_set() and copy.error is not None:
                self.counts.failed += 1
                self._evict(layer, copy, now)
            elif copy.planned and copy.expert not in wanted:
                copy.planned, copy.used = False, now
                self._dropped_LE[layer, copy.expert] = now
        for expert in wanted:
            self._note_return(layer, expert, now)
            if expert in copies:
                copies[expert].planned, copies[expert].used = True, now
        for copy in list(copies.values()):
            end = copy.used + float(self._keep_LE[layer, copy.expert])
            if not copy.planned and end <= now and copy.done.is_set() and not copy.pinned:
                self._evict(layer, copy, end)
        source_of = {move.expert: move.source for move in moves if move.target == self.rank}
        begun: dict[int, Copy] = {}
        for expert in sorted(wanted - copies.keys()):
            slot = self._free_slot(layer, now)
            if slot is None:
                self.counts.refused += 1
                continue
            copy = copies[expert] = begun[expert] = Copy(expert, slot, now, now)
            self.counts.loads += 1
            self.counts.peer_loads += source_of.get(expert) is not None
            self.counts.moved_bytes += self.host.expert_bytes
            if source_of.get(expert) is None:
                self.transfers.load(layer, copy)
        # in the order that all ranks share, whether or not there was room
        for move in moves:
            if move.source is not None and move.target == self.rank:
                self.transfers.receive(layer, move.expert, begun.get(move.expert), move.source)
            elif move.source == self.rank:
                # the others go by the last gather; a copy may have had to make room since
                here = copies.get(move.expert)
                here = here if here is not None and here.ready else None
                self.transfers.send(layer, move.expert, here, move.target)

    def _note_return(self, layer: int, expert: int, now: float) -> None:
        dropped = float(self._dropped_LE[layer, expert])
        if dropped >= 0.0:
            self._dropped_LE[layer, expert] = -1.0
            if self.keep_alive.kind == "adaptive":
                gaps_B = self._gaps_LEB[layer, expert]
                self._keep_LE[layer, expert] = learn(max(0.0, now - dropped), gaps_B, self.keep_alive.seconds)

    def _free_slot(self, layer: int, now: float) -> int | None:
        copies = self._copies_L[layer]
        taken = {copy.slot for copy in copies.values()}
        for slot in range(self.num_slots):
            if slot not in taken:
                return slot
        idle = [copy for copy in copies.values() if not copy.planned]
        if not idle:
            return None
        oldest = min(idle, key=lambda copy: (copy.pinned, not copy.done.is_set(), copy.used, copy.slot))
        oldest.done.wait()
        for sent in oldest.sends:
            sent.wait()
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

    def held(self, layer: int) -> tuple[BoolArray, BoolArray]:
        """Experts of which a complete copy is here, and those whose copy is on its way, ``[E]`` each."""
        ready_E, busy_E = np.zeros((2, self.host.num_experts), np.bool_)
        for expert, copy in self._copies_L[layer].items():
            ready_E[expert] = copy.ready
            busy_E[expert] = not ready_E[expert] and copy.error is None
        return ready_E, busy_E

    def wait(self, layer: int, expert: int) -> float:
        """Block until a copy is complete; the seconds that took. A copy that failed is loaded once more.

        Raises:
            RunFailed: there is no room for it, or its weights cannot be loaded.
        """
        started = time.perf_counter()
        copies = self._copies_L[layer]
        copy = copies.get(expert)
        if copy is not None:
            copy.done.wait()
            if copy.error is not None:
                self.counts.failed += 1
                self._evict(layer, copy, copy.born)
                copy = None
        if copy is None:
            slot = self._free_slot(layer, self._now)
            if slot is None:
                raise RunFailed(f"no memory for expert {expert} of layer {layer}; use fewer extra slots or more ranks")
            copy = copies[expert] = Copy(expert, slot, self._now, self._now)
            self.transfers.load(layer, copy)
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
        counts.peer_failures = self.transfers.peer_failures
        for layer, copies in enumerate(self._copies_L):
            for copy in copies.values():
                end = copy.used + float(self._keep_LE[layer, copy.expert])
                until = now if copy.planned else min(now, end)
                counts.resident_byte_seconds += self.host.expert_bytes * max(0.0, until - copy.born)
        return counts

    def close(self) -> None:
        """Finish the copies on their way and end their thread."""
        self.transfers.close()


def _allocate(
    host: HostExperts, layers: int, slots: int, least: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, torch.Tensor]]:
    """Every layer's slots; fewer where memory has no room for all."""
    for count in range(slots, least - 1, -1):
        try:
            return [
                {name: torch.zeros((count, *shape), dtype=dtype, device=device) for name, shape in host.shapes.items()}
                for _ in range(layers)
            ]
        except (MemoryError, torch.OutOfMemoryError):
            continue
        except RuntimeError as error:
            # the CPU allocator's way of saying it
            if "memory" not in str(error):
                raise
    need = layers * least * host.expert_bytes / 1e9
    raise RunFailed(
        f"the {least} experts of each layer need {need:.1f} GB on {device}, which has no room; use more ranks"
    )
