"""Shapes of a Mixture-of-Experts model, from which bytes, FLOPs and parameter counts follow.

``L`` counts MoE layers only; a spec also knows the dense layers, so that parameter totals can be
checked against published ones and whole-model times can be derived.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moeless.errors import UserError

#: Bytes of one weight, scales included: MXFP4 holds a one-byte scale per 32 values, FP8 (DeepSeek)
#: a four-byte scale per 128x128 block.
BYTES_PER_WEIGHT: dict[str, float] = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0 + 4.0 / (128 * 128),
    "mxfp4": 0.5 + 1.0 / 32,
}


@dataclass(frozen=True)
class Attention:
    """Attention shapes of one layer; ``q_lora_rank`` etc. are set for multi-head latent attention."""

    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    output_bias: bool = False
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    rope_dim: int = 0
    value_dim: int = 0

    def params(self, hidden: int) -> int:
        """Weights of one layer's attention, norms left out."""
        if self.kv_lora_rank:
            query = self.heads * (self.head_dim + self.rope_dim)
            return (
                hidden * self.q_lora_rank
                + self.q_lora_rank * query
                + hidden * (self.kv_lora_rank + self.rope_dim)
                + self.kv_lora_rank * self.heads * (self.head_dim + self.value_dim)
                + self.heads * self.value_dim * hidden
            )
        inner, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = hidden * inner + 2 * hidden * kv + inner * hidden
        return weights + (inner + 2 * kv if self.bias else 0) + (hidden if self.output_bias else 0)

    def kv_values_per_token(self) -> int:
        """Numbers that one token adds to one layer's KV cache."""
        if self.kv_lora_rank:
            return self.kv_lora_rank + self.rope_dim
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class MoESpec:
    """One model. ``moe_layers`` holds the absolute index of every MoE layer, ascending.

    Attributes:
        expert_intermediate_size: FFN width of one routed expert.
        shared_intermediate_size: summed FFN width of the always-active shared experts, 0 for none.
        expert_matrices: 3 for gated FFNs (gate, up, down), 2 for plain ones.
        dtype: type of activations and non-expert weights, a key of ``BYTES_PER_WEIGHT``.
        expert_dtype: type in which routed experts are stored.
        published_params, published_active_params: as the model's authors state them (None: unknown).
        published_active_counts_embedding: whether the stated active count includes input embeddings.
        source: where the shapes come from.
    """

    name: str
    hidden_size: int
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    expert_intermediate_size: int
    attention: Attention
    vocab_size: int
    shared_intermediate_size: int = 0
    dense_intermediate_size: int = 0
    expert_matrices: int = 3
    expert_bias: bool = False
    tied_embeddings: bool = False
    dtype: str = "bfloat16"
    expert_dtype: str = "bfloat16"
    published_params: float | None = None
    published_active_params: float | None = None
    published_active_counts_embedding: bool = True
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("hidden_size", "num_layers", "num_experts", "top_k", "expert_intermediate_size", "vocab_size"):
            if int(getattr(self, field)) < 1:
                raise UserError(f"model spec {self.name!r}: {field} must be at least 1")
        if not self.moe_layers:
            raise UserError(f"model spec {self.name!r} has no MoE layer")
        if list(self.moe_layers) != sorted(set(self.moe_layers)) or self.moe_layers[-1] >= self.num_layers:
            raise UserError(f"model spec {self.name!r}: moe_layers must ascend and lie below {self.num_layers}")
        if self.top_k > self.num_experts:
            raise UserError(f"model spec {self.name!r}: top_k {self.top_k} exceeds {self.num_experts} experts")
        for field in ("dtype", "expert_dtype"):
            if getattr(self, field) not in BYTES_PER_WEIGHT:
                known = ", ".join(BYTES_PER_WEIGHT)
                raise UserError(f"model spec {self.name!r}: {field} {getattr(self, field)!r} is none of {known}")

    @property
    def L(self) -> int:
        """Number of MoE layers."""
        return len(self.moe_layers)

    @property
    def E(self) -> int:
        """Routed experts per MoE layer."""
        return self.num_experts

    @property
    def K(self) -> int:
        """Experts per token."""
        return self.top_k

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert."""
        weights = self.expert_matrices * self.hidden_size * self.expert_intermediate_size
        bias = (self.expert_matrices - 1) * self.expert_intermediate_size + self.hidden_size
        return weights + (bias if self.expert_bias else 0)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one routed expert as stored (M_e of the paper)."""
        return round(self.expert_params * BYTES_PER_WEIGHT[self.expert_dtype])

    @property
    def expert_flops(self) -> int:
        """Floating-point operations of one token in one expert: two per multiply-accumulate."""
        return 2 * self.expert_matrices * self.hidden_size * self.expert_intermediate_size

    @property
    def shared_params(self) -> int:
        """Parameters of the shared experts of one MoE layer."""
        return self.expert_matrices * self.hidden_size * self.shared_intermediate_size

    @property
    def router_params(self) -> int:
        """Parameters of one layer's gate."""
        return self.hidden_size * self.num_experts

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's hidden state on the wire."""
        return round(self.hidden_size * BYTES_PER_WEIGHT[self.dtype])

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token adds to the KV cache of all layers."""
        values = self.num_layers * self.attention.kv_values_per_token()
        return round(values * BYTES_PER_WEIGHT[self.dtype])

    @property
    def embedding_params(self) -> int:
        """Parameters of the input embedding alone."""
        return self.vocab_size * self.hidden_size

    @cached_property
    def non_expert_params(self) -> int:
        """Everything that each rank replicates: attention, gates, shared and dense FFNs, embeddings, norms."""
        dense = (self.num_layers - self.L) * self.expert_matrices * self.hidden_size * self.dense_intermediate_size
        head = 0 if self.tied_embeddings else self.embedding_params
        norms = (2 * self.num_layers + 1) * self.hidden_size
        layers = self.num_layers * self.attention.params(self.hidden_size)
        moe = self.L * (self.router_params + self.shared_params)
        return layers + moe + dense + self.embedding_params + head + norms

    @property
    def total_params(self) -> int:
        """Parameters of the whole model."""
        return self.non_expert_params + self.L * self.num_experts * self.expert_params

    @property
    def active_params(self) -> int:
        """Parameters that one token touches, counted as the model's authors count them."""
        active = self.non_expert_params + self.L * self.top_k * self.expert_params
        return active if self.published_active_counts_embedding else active - self.embedding_params

    @cached_property
    def non_expert_bytes(self) -> int:
        """Bytes that every rank holds besides routed experts."""
        return round(self.non_expert_params * BYTES_PER_WEIGHT[self.dtype])

    def with_expert_dtype(self, expert_dtype: str) -> MoESpec:
        """The same shapes with experts stored in another type."""
        return dataclasses.replace(self, expert_dtype=expert_dtype)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that ``from_json`` takes back."""
        return dataclasses.asdict(self) | {"moe_layers": list(self.moe_layers)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MoESpec:
        """Rebuild a spec.

        Raises:
            UserError: a field is missing, unknown or of the wrong kind.
        """
        try:
            values = dict(data)
            values["attention"] = Attention(**values["attention"])
            values["moe_layers"] = tuple(int(i) for i in values["moe_layers"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a model spec: {error}") from error


def _preset(name: str, **values: Any) -> MoESpec:
    layers = values["num_layers"]
    first_moe = values.pop("first_moe", 0)
    return MoESpec(name=name, moe_layers=tuple(range(first_moe, layers)), **values)


#: Shapes are those of the published configuration files, counts those of the model cards or reports.
PRESETS: dict[str, MoESpec] = {
    spec.name: spec
    for spec in (
        _preset(
            "mixtral-8x7b",
            hidden_size=4096,
            num_layers=32,
            num_experts=8,
            top_k=2,
            expert_intermediate_size=14336,
            attention=Attention(heads=32, kv_heads=8, head_dim=128),
            vocab_size=32000,
            published_params=46.7e9,
            published_active_params=12.9e9,
            source="mistralai/Mixtral-8x7B-v0.1 config; arXiv 2401.04088",
        ),
        _preset(
            "phi-3.5-moe",
            hidden_size=4096,
            num_layers=32,
            num_experts=16,
            top_k=2,
            expert_intermediate_size=6400,
            attention=Attention(heads=32, kv_heads=8, head_dim=128, bias=True, output_bias=True),
            vocab_size=32064,
            published_params=41.9e9,
            published_active_params=6.6e9,
            source="microsoft/Phi-3.5-MoE-instruct config and model card",
        ),
        _preset(
            "llama-4-scout",
            hidden_size=5120,
            num_layers=48,
            num_experts=16,
            top_k=1,
            expert_intermediate_size=8192,
            shared_intermediate_size=8192,
            attention=Attention(heads=40, kv_heads=8, head_dim=128),
            vocab_size=202048,
            published_params=109e9,
            published_active_params=17e9,
            source="meta-llama/Llama-4-Scout-17B-16E text config; the stated total includes the vision tower",
        ),
        _preset(
            "gpt-oss-20b",
            hidden_size=2880,
            num_layers=24,
            num_experts=32,
            top_k=4,
            expert_intermediate_size=2880,
            expert_bias=True,
            expert_dtype="mxfp4",
            attention=Attention(heads=64, kv_heads=8, head_dim=64, bias=True, output_bias=True),
            vocab_size=201088,
            published_params=20.9e9,
            published_active_params=3.6e9,
            published_active_counts_embedding=False,
            source="openai/gpt-oss-20b config and model card",
        ),
        _preset(
            "qwen3-30b-a3b",
            hidden_size=2048,
            num_layers=48,
            num_experts=128,
            top_k=8,
            expert_intermediate_size=768,
            attention=Attention(heads=32, kv_heads=4, head_dim=128),
            vocab_size=151936,
            published_params=30.5e9,
            published_active_params=3.3e9,
            source="Qwen/Qwen3-30B-A3B config and model card",
        ),
        _preset(
            "deepseek-v3",
            hidden_size=7168,
            num_layers=61,
            first_moe=3,
            num_experts=256,
            top_k=8,
            expert_intermediate_size=2048,
            shared_intermediate_size=2048,
            dense_intermediate_size=18432,
            expert_dtype="fp8",
            attention=Attention(
                heads=128,
                kv_heads=128,
                head_dim=128,
                q_lora_rank=1536,
                kv_lora_rank=512,
                rope_dim=64,
                value_dim=128,
            ),
            vocab_size=129280,
            published_params=671e9,
            published_active_params=37e9,
            source="deepseek-ai/DeepSeek-V3 config; arXiv 2412.19437",
        ),
        _preset(
            "bundled",
            hidden_size=192,
            num_layers=8,
            num_experts=16,
            top_k=2,
            expert_intermediate_size=96,
            attention=Attention(heads=6, kv_heads=2, head_dim=32),
            vocab_size=4096,
            tied_embeddings=True,
            source="moeless/assets/model, trained by this project",
        ),
    )
}


def preset(name: str) -> MoESpec:
    """A built-in spec.

    Raises:
        UserError: no preset has that name.
    """
    if name not in PRESETS:
        raise UserError(f"no model preset is called {name!r}; there are: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
