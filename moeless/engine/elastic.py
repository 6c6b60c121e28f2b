"""The elastic MoE layer of one rank: a controller's decision carried out by the core, with its records."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch

from moeless.contracts import IntArray, LayerPlan
from moeless.engine.controller import Controller
from moeless.engine.core import PartTimes, run_layer
from moeless.engine.ffn import ExpertFFN

#: Parts of a layer's time in a record, in seconds; see :class:`moeless.engine.core.PartTimes`.
PARTS = (
    *("control", "stall", "exchange", "gather", "compute", "total", "planning", "plan_wait", "plan_exposed"),
    *("forecast", "dispatch", "forecast_beside", "forecast_beside_wait", "forecast_beside_exposed"),
)
#: Columns of a record: seconds by part, then this rank's tokens and copies.
COLUMNS = (*PARTS, "tokens", "replicas", "active", "warm", "resident")


@dataclass
class ElasticExperts:
    """What a host calls for each MoE layer.

    Attributes:
        rows: one record per layer call, see ``COLUMNS``.
        routing: ids and weights (and gate inputs, where ``record_inputs`` is set) of each layer of this iteration,
            kept where ``record`` is set.
    """

    controller: Controller
    ffn: ExpertFFN
    record: bool = False
    record_inputs: bool = False
    rows: list[tuple[float, ...]] = field(default_factory=list)
    routing: list[tuple[np.ndarray, ...]] = field(default_factory=list)  # type: ignore[type-arg]
    first_token: int = 0
    _open: list[tuple[int, PartTimes]] = field(default_factory=list)

    def __call__(
        self, layer: int, hidden_TH: torch.Tensor, topk_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Route, exchange, compute and combine one layer; collective."""
        controller = self.controller
        if layer == 0:
            self.settle()
        if controller.policy.lossy:
            topk_TK = even_choice(topk_TK, _turns(controller.plans[layer]), self.first_token)
        times, started = PartTimes(), time.perf_counter()
        decision = controller.decide(layer, hidden_TH, topk_TK, times)
        store, decided = controller.store, time.perf_counter()
        out = run_layer(
            hidden_TH,
            topk_TK,
            weights_TK,
            plan=decision.plan,
            quota_SR=decision.quota_SR,
            slot_of_expert=store.slot_of_expert(layer),
            slots=store.slots_L[layer],
            ffn=self.ffn,
            exchange=controller.exchange,
            times=times,
        )
        times.total = (time.perf_counter() if times.marks is None else decided) - started
        plan, used_R = decision.plan, decision.quota_SR.sum(0)
        tokens = int(used_R[plan.gpu_R == controller.rank].sum())
        self.rows.append(
            (
                *(getattr(times, part) for part in PARTS),
                tokens,
                plan.R,
                int((used_R > 0).sum()),
                decision.warm,
                store.resident(layer),
            )
        )
        if times.marks is not None:
            self._open.append((len(self.rows) - 1, times))
        if self.record:
            kept = [topk_TK, weights_TK.half()] + ([hidden_TH.half()] if self.record_inputs else [])
            self.routing.append(tuple(value.cpu().numpy() for value in kept))
        return out

    def settle(self) -> None:
        """Read what the device took for the layers whose records wait for it: an iteration's at once."""
        for index, times in self._open:
            times.settle()
            self.rows[index] = (*(getattr(times, part) for part in PARTS), *self.rows[index][len(PARTS) :])
        self._open.clear()

    def reset(self) -> None:
        """Forget all records."""
        self._open.clear()
        self.rows.clear()
        self.routing.clear()


def even_choice(topk_TK: torch.Tensor, turn_E: IntArray, first: int) -> torch.Tensor:
    """The oracle's override: tokens take the experts in turn, whatever the gate says (arXiv 2603.06350, baselines).

    Args:
        turn_E: the experts in the order of their turns.
        first: tokens on lower ranks, so that loads are even over all ranks.
    """
    tokens, top_k = topk_TK.shape
    turns = np.arange(first * top_k, (first + tokens) * top_k) % len(turn_E)
    return torch.from_numpy(turn_E[turns]).view(tokens, top_k).to(topk_TK)


def _turns(plan: LayerPlan) -> IntArray:
    """A static plan's experts so that successive ones lie on different GPUs."""
    nth_R = np.arange(plan.R) - np.searchsorted(plan.gpu_R, plan.gpu_R)
    return plan.expert_R[np.lexsort((plan.gpu_R, nth_R))].astype(np.int64)


def columns(rows: list[tuple[float, ...]], layers: int) -> IntArray:
    """Records as ``[iterations, L, columns]`` float64."""
    return np.asarray(rows, np.float64).reshape(-1, layers, len(COLUMNS))  # type: ignore[return-value]
