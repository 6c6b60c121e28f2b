"""Hugging Face checkpoints in Megatron-core's names and layouts, routed experts left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from moeless.engine.checkpoint import Checkpoint
from moeless.errors import UserError
from moeless.spec import MoESpec

#: Families whose attention, norms and router Megatron's layers reproduce.
FAMILIES = ("mixtral", "qwen3_moe", "olmoe")


@dataclass(frozen=True)
class Family:
    """What Megatron has to be told of a checkpoint.

    Attributes:
        renormalised: the chosen experts' weights sum to one.
        qk_norm: query and key norms per head (Qwen3), over all heads (OLMoE), or none.
        window: positions that a token sees, None for all.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    expert_size: int
    vocab: int
    max_positions: int
    epsilon: float
    rope_theta: float
    tied: bool
    renormalised: bool
    qk_norm: Literal["head", "all"] | None
    window: int | None


def family_of(config: Mapping[str, Any], spec: MoESpec, folder: Path) -> Family:
    """Read a Transformers configuration.

    Raises:
        UserError: the family, or something it sets, has no counterpart in the Megatron host.
    """
    kind = str(config.get("model_type"))

    def refuse(what: str) -> UserError:
        return UserError(f"{folder}: the Megatron host does not serve {what}; use --host transformers")

    if kind not in FAMILIES:
        raise refuse(f"model family {kind!r} (it serves {', '.join(FAMILIES)})")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", None):
        raise refuse(f"rotary type {rope.get('rope_type', rope.get('type'))!r}")
    if spec.num_layers != spec.L:
        raise refuse("models with dense layers between MoE layers")
    for name in ("attention_bias", "clip_qkv"):
        if config.get(name):
            raise refuse(f"{name} = {config[name]!r}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise refuse(f"activation {config['hidden_act']!r}")
    heads = int(config["num_attention_heads"])
    sliding = kind == "mixtral" or bool(config.get("use_sliding_window"))
    default_theta = 1e6 if kind == "mixtral" else 1e4
    return Family(
        layers=spec.num_layers,
        hidden=spec.hidden_size,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or spec.hidden_size // heads),
        experts=spec.E,
        top_k=spec.K,
        expert_size=spec.expert_intermediate_size,
        vocab=spec.vocab_size,
        max_positions=int(config.get("max_position_embeddings", 4096)),
        epsilon=float(config.get("rms_norm_eps", 1e-5)),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", default_theta))),
        tied=spec.tied_embeddings,
        renormalised=kind == "mixtral" or bool(config.get("norm_topk_prob", False)),
        qk_norm={"mixtral": None, "qwen3_moe": "head", "olmoe": "all"}[kind],  # type: ignore[arg-type]
        window=config.get("sliding_window") if sliding else None,
    )


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint, family: Family) -> None:
    """Copy every tensor that is no routed expert's.

    Raises:
        UserError: the checkpoint lacks one, or one has another shape.
    """
    parameters = dict(model.named_parameters())

    def copy(name: str, value: torch.Tensor) -> None:
        target = parameters.pop(name)
        if target.shape != value.shape:
            shapes = f"{tuple(value.shape)}, not {tuple(target.shape)}"
            raise UserError(f"{checkpoint.folder}: the tensor for {name} has shape {shapes}")
        with torch.no_grad():
            target.copy_(value)

    def read(key: str) -> torch.Tensor:
        return checkpoint.read(checkpoint.find(key) or key)

    copy("embedding.word_embeddings.weight", read("model.embed_tokens.weight"))
    copy("decoder.final_layernorm.weight", read("model.norm.weight"))
    if not family.tied:
        copy("output_layer.weight", read("lm_head.weight"))
    groups, width = family.kv_heads, family.hidden
    for layer in range(family.layers):
        theirs, ours = f"model.layers.{layer}", f"decoder.layers.{layer}"
        copy(f"{ours}.input_layernorm.weight", read(f"{theirs}.input_layernorm.weight"))
        copy(f"{ours}.pre_mlp_layernorm.weight", read(f"{theirs}.post_attention_layernorm.weight"))
        copy(f"{ours}.mlp.router.weight", read(f"{theirs}.mlp.gate.weight"))
        # Megatron keeps a group's queries, key and value together
        parts = [read(f"{theirs}.self_attn.{name}_proj.weight").view(groups, -1, width) for name in "qkv"]
        copy(f"{ours}.self_attention.linear_qkv.weight", torch.cat(parts, 1).reshape(-1, width))
        copy(f"{ours}.self_attention.linear_proj.weight", read(f"{theirs}.self_attn.o_proj.weight"))
        if family.qk_norm is not None:
            for name in "qk":
                copy(f"{ours}.self_attention.{name}_layernorm.weight", read(f"{theirs}.self_attn.{name}_norm.weight"))
    if parameters:
        raise UserError(f"{checkpoint.folder}: the Megatron model has {next(iter(parameters))}, the checkpoint has not")
