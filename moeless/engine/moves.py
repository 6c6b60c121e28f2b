"""Which copies a new plan needs, and where each of them comes from: the same answer on every rank.

Every rank knows, from a layer's last gather, which copies are complete and which are on their way, so all of them
compute the same ordered list of moves; a copy's sender and receiver need no word of agreement.

Axes: G ranks, E experts, R replicas of a layer, W words of 64 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless.contracts import BoolArray, IntArray, LayerPlan
from moeless.costs import CostModel
from moeless.engine.options import CopySource


@dataclass(frozen=True)
class Move:
    """One expert of one layer to rank ``target``, from rank ``source`` or, where that is None, from host memory."""

    layer: int
    expert: int
    source: int | None
    target: int


@dataclass(frozen=True)
class Held:
    """What every rank holds of one layer, as last gathered."""

    ready_GE: BoolArray
    busy_GE: BoolArray

    @classmethod
    def of_plan(cls, plan: LayerPlan, ranks: int, experts: int) -> Held:
        """Every replica of a deployed plan, complete."""
        ready_GE = np.zeros((ranks, experts), np.bool_)
        ready_GE[plan.gpu_R, plan.expert_R] = True
        return cls(ready_GE, np.zeros_like(ready_GE))

    @classmethod
    def unpack(cls, words_GW: IntArray, experts: int) -> Held:
        """From every rank's :func:`pack`."""
        words_GW = np.ascontiguousarray(words_GW)
        bits = np.unpackbits(words_GW.view(np.uint8), axis=1, bitorder="little").astype(np.bool_)
        half = bits.shape[1] // 2
        return cls(bits[:, :experts], bits[:, half : half + experts])

    def ready_R(self, plan: LayerPlan) -> BoolArray:
        """Which of a plan's replicas are complete."""
        return self.ready_GE[plan.gpu_R, plan.expert_R]


def num_words(experts: int) -> int:
    """Words that one rank's readiness takes."""
    return 2 * -(-experts // 64)


def pack(ready_E: BoolArray, busy_E: BoolArray) -> IntArray:
    """One rank's readiness of a layer as 64-bit words: complete copies, then copies on their way."""
    words = num_words(len(ready_E)) // 2
    bits = np.zeros((2, 64 * words), np.uint8)
    bits[0, : len(ready_E)], bits[1, : len(busy_E)] = ready_E, busy_E
    return np.packbits(bits, axis=1, bitorder="little").reshape(-1).view(np.int64)


def moves_to(plan: LayerPlan, held: Held, costs: CostModel, expert_bytes: float, prefer: CopySource) -> list[Move]:
    """The copies that the plan names and that no rank has or awaits there, in an order that all ranks share.

    A rank sends a copy only where its own is complete and stays in the new plan, so that it cannot be evicted before
    it is sent. Among such ranks the cheapest link counts, then the fewest copies to send, then the lowest rank.
    """
    missing_R = ~(held.ready_GE | held.busy_GE)[plan.gpu_R, plan.expert_R]
    if not missing_R.any():
        return []
    stays_GE = np.zeros_like(held.ready_GE)
    stays_GE[plan.gpu_R, plan.expert_R] = True
    stays_GE &= held.ready_GE
    cluster = costs.cluster
    sending_G = np.zeros(len(stays_GE), np.int64)
    moves = []
    for replica in np.flatnonzero(missing_R).tolist():
        expert, target = int(plan.expert_R[replica]), int(plan.gpu_R[replica])
        host = costs.load_seconds(expert_bytes, "host", target)
        choices = []
        for rank in np.flatnonzero(stays_GE[:, expert]).tolist() if prefer != "host" else ():
            tier = "peer" if cluster.island_of(rank) == cluster.island_of(target) else "peer-slow"
            seconds = costs.load_seconds(expert_bytes, tier, target)
            if prefer == "peer" or seconds < host:
                choices.append((seconds, int(sending_G[rank]), rank))
        source = min(choices)[2] if choices else None
        if source is not None:
            sending_G[source] += 1
        moves.append(Move(plan.layer, expert, source, target))
    return moves
