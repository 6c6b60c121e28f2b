"""One elastic MoE layer: tokens to copies by quota, grouped compute, back, combine.

Axes: T tokens of this rank, K top-k, N = T*K assignments, R replicas of the layer, S source ranks, G ranks, C slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from moeless.contracts import Int32Array, IntArray, LayerPlan
from moeless.engine.device import Marks, upload
from moeless.engine.exchange import Exchange
from moeless.engine.ffn import ExpertFFN


@dataclass
class PartTimes:
    """Seconds of one layer on one rank; ``compute`` is processor time on CPUs, wall time on GPUs.

    Attributes:
        control: own processor time on the critical path.
        gather: the part of ``exchange`` in which counts were gathered, by the clock; on all ranks but the last to
            come it is mostly waiting for that one.
        planning: the planning thread's own processor time; ``plan_wait`` is how long this thread waited for it by the
            clock, ``plan_exposed`` how long it would have waited had the two threads a core each.
        forecast, dispatch: parts of ``control`` in which forecasts were made here, and counts became quotas.
        forecast_beside: own processor time of forecasts beside the experts, on another thread; its ``_wait`` and
            ``_exposed`` are what they are of planning.
        marks: stages on a device whose times are not read yet.
    """

    control: float = 0.0
    stall: float = 0.0
    exchange: float = 0.0
    gather: float = 0.0
    compute: float = 0.0
    total: float = 0.0
    planning: float = 0.0
    plan_wait: float = 0.0
    plan_exposed: float = 0.0
    forecast: float = 0.0
    dispatch: float = 0.0
    forecast_beside: float = 0.0
    forecast_beside_wait: float = 0.0
    forecast_beside_exposed: float = 0.0
    marks: Marks | None = None

    def settle(self) -> None:
        """Read the stages' times: sent, computed, sent back, combined."""
        if self.marks is None:
            return
        self.exchange += self.marks.seconds(0, 1) + self.marks.seconds(2, 3)
        self.compute += self.marks.seconds(1, 2, own=True)
        if self.marks.deferred:
            # the host had counted up to the first mark
            self.total += self.marks.seconds(0, 4)
        self.marks = None


def order_by_replica(topk_TK: torch.Tensor, quota_R: IntArray, expert_R: Int32Array) -> torch.Tensor:
    """Assignments (index t*K+k) in order of the replica that serves them, ``[N]``.

    A rank's tokens fill the quotas of an expert's replicas in token order, lowest replica first. Replicas are sorted
    by GPU, so the result is in order of destination.
    """
    by_expert = torch.argsort(topk_TK.reshape(-1), stable=True)
    replicas = np.argsort(expert_R, kind="stable")
    replica_N = np.repeat(replicas, quota_R[replicas])
    return by_expert[upload(np.argsort(replica_N, kind="stable"), by_expert.device)]


def combine(
    rows_NH: torch.Tensor, order_N: torch.Tensor, weights_TK: torch.Tensor, tokens: int, top_k: int
) -> torch.Tensor:
    """Put rows back in token order and sum each token's weighted expert outputs, ``[T, H]``."""
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    # one pass over the rows: gather, weigh and add
    return functional.embedding_bag(
        place_N.view(tokens, top_k), rows_NH, mode="sum", per_sample_weights=weights_TK.to(rows_NH.dtype)
    )


def run_layer(
    hidden_TH: torch.Tensor,
    topk_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    plan: LayerPlan,
    quota_SR: IntArray,
    slot_of_expert: Mapping[int, int],
    slots: Mapping[str, torch.Tensor],
    ffn: ExpertFFN,
    exchange: Exchange,
    times: PartTimes,
) -> torch.Tensor:
    """Dispatch, compute, return and combine; every rank calls it with the same plan and quotas.

    Zero tokens, zero copies and a single rank are valid.

    Args:
        slot_of_expert: this rank's copies that are in memory, expert to slot; must hold those with a quota here.
    """
    rank, world = exchange.ranks.rank, exchange.ranks.world
    tokens, top_k = topk_TK.shape
    own_R = quota_SR[rank]
    order_N = order_by_replica(topk_TK, own_R, plan.expert_R)
    send_G = np.bincount(plan.gpu_R, weights=own_R, minlength=world).astype(np.int64).tolist()
    here = np.flatnonzero(plan.gpu_R == rank)
    quota_Sr = quota_SR[:, here]
    receive_S = quota_Sr.sum(1).tolist()

    marks = times.marks = Marks(exchange.ranks.device)
    marks.mark()
    rows_NH = hidden_TH.index_select(0, order_N // top_k)
    if ffn.weighs_input:
        rows_NH = rows_NH * weights_TK.reshape(-1)[order_N, None].to(rows_NH.dtype)
        weights_TK = torch.ones_like(weights_TK)
    arrived = exchange.all_to_all(rows_NH, send_G, receive_S)
    marks.mark()
    slot_r = [slot_of_expert.get(int(e), 0) for e in plan.expert_R[here]]
    order, count_C = _regroup(quota_Sr, slot_r, len(next(iter(slots.values()))))
    by_slot = upload(order, arrived.device)
    computed = ffn(arrived.index_select(0, by_slot).to(ffn.dtype), count_C, slots).to(arrived.dtype)
    returned = torch.empty_like(arrived)
    returned[by_slot] = computed
    marks.mark()
    back = exchange.all_to_all(returned, receive_S, send_G)
    marks.mark()
    out = combine(back, order_N, weights_TK, tokens, top_k)
    marks.mark()
    if not marks.deferred:
        times.settle()
    return out


def _regroup(quota_Sr: IntArray, slot_r: Sequence[int], num_slots: int) -> tuple[IntArray, list[int]]:
    """From (source, replica) order to slot order: row indices, and rows of each slot."""
    slot_N = np.repeat(np.tile(np.asarray(slot_r, np.int64), len(quota_Sr)), quota_Sr.reshape(-1))
    count_C = np.bincount(slot_N, minlength=num_slots).tolist()
    return np.argsort(slot_N, kind="stable"), count_C
