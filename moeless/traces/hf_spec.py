"""A model's shapes read off its Transformers modules, so that no family needs code of its own."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeless.errors import UserError
from moeless.spec import BYTES_PER_WEIGHT, Attention, MoESpec

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.")
_LAYER_NAME = re.compile(r".*(?:^|\.)(?:layers|h|blocks|layer)\.\d+(?=\.)")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "top_k")
_LLAMA4 = "Llama4TextMoe"


@dataclass(frozen=True)
class MoEBlock:
    """One MoE layer of a loaded model.

    Attributes:
        layer: absolute index of the layer.
        name: the module's name in the model.
        block: the module that holds gate and experts.
        experts: the experts module, whose call shows ids and weights; None for Llama-4, whose
            block computes every expert on every token and shows them in its router only.
        gate: the router module, None where none is recognised.
    """

    layer: int
    name: str
    block: Any
    experts: Any | None
    gate: Any | None


def text_config(config: Any) -> Any:
    """The language model's part of a configuration."""
    getter = getattr(config, "get_text_config", None)
    return getter() if callable(getter) else config


def find_blocks(model: Any) -> list[MoEBlock]:
    """MoE layers of a model in order; vision towers and dense layers are left out.

    Raises:
        UserError: there are none, or they cannot be told apart by layer.
    """
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        if "vision" in name or "visual" in name or "audio" in name:
            continue
        is_llama4 = type(module).__name__ == _LLAMA4
        if not is_llama4 and not (hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate")):
            continue
        numbers = _LAYER.findall(name + ".")
        if not numbers:
            continue
        block_name = name if is_llama4 else name.rpartition(".")[0]
        block = modules[block_name]
        gate = next((getattr(block, key) for key in ("gate", "router") if hasattr(block, key)), None)
        found.append(MoEBlock(int(numbers[-1]), name, block, None if is_llama4 else module, gate))
    if not found:
        raise UserError(
            f"{type(model).__name__} has no MoE layer on Transformers' experts interface, so its routing "
            "cannot be recorded; moeless import-trace reads routing that another system recorded"
        )
    layers = [block.layer for block in found]
    if layers != sorted(set(layers)):
        raise UserError(f"{type(model).__name__} has several MoE blocks in one layer, which is not supported")
    return found


def _expert_shape(block: MoEBlock) -> tuple[int, int, int, int, bool]:
    """(experts, hidden size, expert width, matrices, biases) of a block."""
    experts = block.experts if block.experts is not None else block.block.experts
    transposed = bool(getattr(experts, "is_transposed", block.experts is None))
    down = experts.down_proj
    # [E, H, I], or [E, I, H] where transposed
    count, first, second = down.shape
    hidden, width = (second, first) if transposed else (first, second)
    matrices = 3 if getattr(experts, "has_gate", True) else 2
    return int(count), int(hidden), int(width), matrices, bool(getattr(experts, "has_bias", False))


def _top_k(block: MoEBlock, config: Any) -> int:
    for owner, names in ((block.block, ("top_k", "num_experts_per_tok")), (block.gate, ("top_k",)), (config, _TOP_K)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    raise UserError(f"cannot tell how many experts a token of {config.model_type} goes to")


def _attention(config: Any, hidden: int) -> Attention:
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    bias = bool(getattr(config, "attention_bias", False))
    if getattr(config, "kv_lora_rank", None):
        return Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=int(config.qk_nope_head_dim),
            q_lora_rank=int(getattr(config, "q_lora_rank", None) or 0),
            kv_lora_rank=int(config.kv_lora_rank),
            rope_dim=int(config.qk_rope_head_dim),
            value_dim=int(config.v_head_dim),
        )
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    return Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias, output_bias=bias)


def _shared_params(block: MoEBlock, model: Any) -> int:
    """Weights of the always-active experts, which sit in the block or beside it in the decoder layer."""
    layer = dict(model.named_modules())[_LAYER_NAME.match(block.name).group(0)]  # type: ignore[union-attr]
    own = {
        id(weight): weight
        for name, module in layer.named_modules()
        if "shared" in name.rpartition(".")[2] and "gate" not in name.rpartition(".")[2]
        for weight in module.parameters()
        if weight.dim() == 2
    }
    return sum(int(weight.numel()) for weight in own.values())


def _dtype_name(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if name in BYTES_PER_WEIGHT else "fp8" if "float8" in name else "bfloat16"


def spec_of_model(model: Any, name: str) -> MoESpec:
    """Shapes of a loaded (or meta) model.

    Raises:
        UserError: it has no MoE layer, or its layers differ in experts.
    """
    config = text_config(model.config)
    blocks = find_blocks(model)
    shapes = {_expert_shape(block) for block in blocks}
    if len(shapes) > 1:
        raise UserError(f"{name} has MoE layers of different shapes ({sorted(shapes)}), which is not supported")
    experts, hidden, width, matrices, bias = shapes.pop()
    layers = max(int(getattr(config, "num_hidden_layers", 0)), blocks[-1].layer + 1)
    quantisation = getattr(model.config, "quantization_config", None)
    method = (
        quantisation.get("quant_method")
        if isinstance(quantisation, dict)
        else getattr(quantisation, "quant_method", "")
    )
    dtype = _dtype_name(next(model.parameters()).dtype)
    dense = 0
    if len(blocks) < layers:
        dense = int(getattr(config, "intermediate_size_mlp", None) or getattr(config, "intermediate_size", None) or 0)
    return MoESpec(
        name=name,
        hidden_size=hidden,
        num_layers=layers,
        moe_layers=tuple(block.layer for block in blocks),
        num_experts=experts,
        top_k=_top_k(blocks[0], config),
        expert_intermediate_size=width,
        attention=_attention(config, hidden),
        vocab_size=int(config.vocab_size),
        shared_intermediate_size=_shared_params(blocks[0], model) // (matrices * hidden),
        dense_intermediate_size=dense,
        expert_matrices=matrices,
        expert_bias=bias,
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        dtype=dtype,
        expert_dtype={"mxfp4": "mxfp4", "fp8": "fp8"}.get(str(method or "").rpartition(".")[2].lower(), dtype),
        source=f"modules of {type(model).__name__}",
    )


def spec_of_config(config: Any, name: str) -> MoESpec:
    """Shapes of the model that a configuration describes, built without memory for weights.

    Raises:
        UserError: it is not a MoE model on Transformers' experts interface.
    """
    import torch

    from moeless.traces.hf_model import model_classes

    dtype = getattr(config, "dtype", None) or torch.bfloat16
    with torch.device("meta"):
        model = model_classes(config)[0].from_config(config)
    made = spec_of_model(model, name)
    quantised = made.expert_dtype in ("mxfp4", "fp8")
    return dataclasses.replace(
        made, dtype=_dtype_name(dtype), expert_dtype=made.expert_dtype if quantised else _dtype_name(dtype)
    )


def spec_of_folder(folder: Path) -> MoESpec:
    """Shapes of the model in a folder.

    Raises:
        UserError: the folder holds no configuration of a known MoE model.
    """
    from moeless.traces.hf_model import load_config

    return spec_of_config(load_config(str(folder)), folder.resolve().name)
