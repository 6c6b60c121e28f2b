"""What the elastic core asks of a model.

Axes: T tokens of a step on this rank, K top-k, H hidden, N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from moeless.engine.checkpoint import Checkpoint
from moeless.engine.ffn import ExpertFFN
from moeless.engine.flat import FlatBatch, KVCache
from moeless.spec import MoESpec

#: ``(layer, hidden_TH, topk_TK, weights_TK) -> out_TH`` of one MoE layer, called in layer order on every rank.
MoELayer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Host(ABC):
    """A model without routed experts in memory; every rank holds one.

    Attributes:
        spec: its shapes; ``ffn`` computes its experts.
        moe: the elastic layer; set before the first step.
        model: the family's modules; their routed experts have no weights.
        checkpoint: where weights are read from.
    """

    spec: MoESpec
    ffn: ExpertFFN
    device: torch.device
    dtype: torch.dtype
    moe: MoELayer
    model: torch.nn.Module
    checkpoint: Checkpoint
    cache: KVCache

    @abstractmethod
    def read_expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """One expert's weights from the checkpoint, named and shaped as ``ffn.shapes``."""

    @abstractmethod
    def step(self, batch: FlatBatch) -> torch.Tensor:
        """Run a step with at least one token; float32 logits of the wanted rows, ``[N, V]``."""

    def idle_step(self) -> None:
        """Walk the MoE layers without a token, so that the other ranks find this one at every exchange."""
        hidden = torch.empty((0, self.spec.hidden_size), dtype=self.dtype, device=self.device)
        topk = torch.empty((0, self.spec.K), dtype=torch.int64, device=self.device)
        weights = torch.empty((0, self.spec.K), dtype=torch.float32, device=self.device)
        for layer in range(self.spec.L):
            self.moe(layer, hidden, topk, weights)
