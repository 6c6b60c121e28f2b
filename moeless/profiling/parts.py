"""Times of a layer's parts around the experts: router, attention, permute, combine, over tokens.

Axes: T tokens, H hidden, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from moeless.engine.core import combine as weighted_sum
from moeless.engine.core import order_by_replica
from moeless.profiling.monotone import monotone_curve
from moeless.profiling.timing import Effort, Sample, measure
from moeless.spec import MoESpec

#: Past positions that each token of the decode measurement attends to.
DECODE_CONTEXT = 1024


def curve_entry(x: Sequence[int], samples: Sequence[Sample], axis: str) -> dict[str, Any]:
    """A profile's curve: the monotone one nearest to the medians, the medians, and the spread."""
    middle = np.array([sample.seconds for sample in samples])
    return {
        axis: list(x),
        "seconds": monotone_curve(middle).tolist(),
        "measured": middle.tolist(),
        "low": [sample.low for sample in samples],
        "high": [sample.high for sample in samples],
    }


def route(hidden_TH: torch.Tensor, gate_EH: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k expert ids and renormalised weights."""
    score = torch.softmax(functional.linear(hidden_TH, gate_EH).float(), dim=-1)
    weight, chosen = torch.topk(score, top_k, dim=-1)
    return chosen, weight / weight.sum(-1, keepdim=True)


def permute(rows_TH: torch.Tensor, replica_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows sorted by replica, and the order that did it."""
    order = torch.argsort(replica_T, stable=True)
    return rows_TH.index_select(0, order), order


def combine(rows_TH: torch.Tensor, order_T: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
    """Weighted rows back in the order in which they came."""
    out_TH = torch.empty_like(rows_TH)
    out_TH.index_copy_(0, order_T, rows_TH)
    return out_TH.mul_(weight_T.unsqueeze(-1))


class AttentionBlock:
    """Projections and scaled dot-product attention of a model's shapes, random weights, no positions or norms."""

    def __init__(self, spec: MoESpec, dtype: torch.dtype, device: torch.device) -> None:
        a, hidden = spec.attention, spec.hidden_size
        self.latent = a.kv_lora_rank > 0
        self.heads = a.heads
        self.kv_heads = a.heads if self.latent else a.kv_heads
        self.key_dim = a.head_dim + a.rope_dim
        self.value_dim = a.value_dim or a.head_dim

        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.empty(rows, columns, dtype=dtype, device=device).normal_(0.0, columns**-0.5)

        kv_rows = self.kv_heads * (self.key_dim + self.value_dim)
        if self.latent:
            # queries and key-values go through low-rank latents
            self.query = [weight(a.q_lora_rank, hidden), weight(self.heads * self.key_dim, a.q_lora_rank)]
            self.key_value = [weight(a.kv_lora_rank, hidden), weight(kv_rows, a.kv_lora_rank)]
        else:
            self.query, self.key_value = [weight(self.heads * self.key_dim, hidden)], [weight(kv_rows, hidden)]
        self.out = weight(hidden, self.heads * self.value_dim)

    def project(self, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries ``[T, heads, D]``, keys and values ``[T, kv heads, D]``."""
        query = key_value = hidden_TH
        for weight in self.query:
            query = functional.linear(query, weight)
        for weight in self.key_value:
            key_value = functional.linear(key_value, weight)
        key_value = key_value.view(-1, self.kv_heads, self.key_dim + self.value_dim)
        key, value = key_value.split([self.key_dim, self.value_dim], dim=-1)
        return query.view(-1, self.heads, self.key_dim), key, value

    def prefill(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """One request of T tokens, causal."""
        query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in self.project(hidden_TH))
        grouped = self.heads != self.kv_heads
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return functional.linear(mixed.squeeze(0).transpose(0, 1).reshape(len(hidden_TH), -1), self.out)

    def decode(self, hidden_TH: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """One token of each of T requests, over a cache ``[T, heads, context, dim]``."""
        query, _, _ = self.project(hidden_TH)
        grouped = self.heads != self.kv_heads
        mixed = functional.scaled_dot_product_attention(query.unsqueeze(2), key, value, enable_gqa=grouped)
        return functional.linear(mixed.reshape(len(hidden_TH), -1), self.out)


def measure_parts(
    spec: MoESpec, dtype: torch.dtype, device: torch.device, tokens: Sequence[int], cache: int, effort: Effort
) -> dict[str, Any]:
    """Every curve of a profile's ``parts``."""
    hidden = spec.hidden_size
    gate = torch.empty(spec.num_experts, hidden, dtype=dtype, device=device).normal_(0.0, hidden**-0.5)
    block = AttentionBlock(spec, dtype, device)
    row_bytes = hidden * gate.element_size()

    def inputs(count: int) -> list[torch.Tensor]:
        copies = int(np.clip(2 * cache // max(1, count * row_bytes), 1, 8))
        return [torch.empty(count, hidden, dtype=dtype, device=device).normal_() for _ in range(copies)]

    def over_tokens(counts: Sequence[int], make: Callable[[torch.Tensor], Callable[[], object]]) -> dict[str, Any]:
        samples = [measure([make(rows) for rows in inputs(count)], device, effort) for count in counts]
        return curve_entry(counts, samples, "tokens")

    def permuting(rows: torch.Tensor) -> Callable[[], object]:
        replica = torch.randint(0, spec.num_experts, (len(rows),), device=device)
        return lambda: permute(rows, replica)

    def combining(rows: torch.Tensor) -> Callable[[], object]:
        order = torch.randperm(len(rows), device=device)
        weight = torch.rand(len(rows), device=device).to(dtype)
        return lambda: combine(rows, order, weight)

    def decoding(rows: torch.Tensor) -> Callable[[], object]:
        shape = (len(rows), block.kv_heads, DECODE_CONTEXT)
        key = torch.empty(*shape, block.key_dim, dtype=dtype, device=device).normal_()
        value = torch.empty(*shape, block.value_dim, dtype=dtype, device=device).normal_()
        return lambda: block.decode(rows, key, value)

    def at_source(rows: torch.Tensor) -> Callable[[], object]:
        # what a rank does with its own tokens around the exchange, by the engine's own functions
        topk = torch.rand(len(rows), spec.num_experts, device=device).topk(spec.top_k).indices
        weight = torch.rand(len(rows), spec.top_k, device=device)
        quota = np.bincount(topk.cpu().numpy().reshape(-1), minlength=spec.num_experts)
        replicas = np.arange(spec.num_experts, dtype=np.int32)

        def run() -> torch.Tensor:
            order = order_by_replica(topk, quota, replicas)
            sent = rows.index_select(0, order // spec.top_k)
            return weighted_sum(sent, order, weight, len(rows), spec.top_k)

        return run

    cached = block.kv_heads * DECODE_CONTEXT * (block.key_dim + block.value_dim) * gate.element_size()
    room = 8 * 2**30 if device.type == "cuda" else 2**28
    batches = [count for count in tokens if count * cached * 8 <= room and count <= 256] or [1]
    lengths = [count for count in tokens if count <= 4096]
    return {
        "router": over_tokens(tokens, lambda rows: lambda: route(rows, gate, spec.top_k)),
        "attention": over_tokens(lengths, lambda rows: lambda: block.prefill(rows)),
        "attention_decode": over_tokens(batches, decoding),
        "permute": over_tokens(tokens, permuting),
        "combine": over_tokens(tokens, combining),
        "source": over_tokens(lengths, at_source),
    }
