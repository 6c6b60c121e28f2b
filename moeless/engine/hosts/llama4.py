"""Llama-4 in the Transformers host, whose MoE block does not use Transformers' experts interface.

Its block computes every expert on every token; here the block's own router chooses, and the elastic experts compute
what it chose. Two more things differ from other families: a token's weight scales its expert's *input*, and layers
without rotary angles scale queries by the token's position, which a flat batch cannot tell from the row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from moeless.engine.ffn import GatedFFN

_BLOCK, _ATTENTION = "Llama4TextMoe", "Llama4TextAttention"


def is_llama4(model: torch.nn.Module) -> bool:
    """Whether the model's MoE blocks are Llama-4's."""
    return any(type(module).__name__ == _BLOCK for module in model.modules())


def adapt(moe: Callable[..., torch.Tensor], model: torch.nn.Module, dtype: torch.dtype) -> tuple[list[str], GatedFFN]:
    """Let the host's ``moe`` compute the routed experts; their modules' names in layer order, and their mathematics."""
    names: list[str] = []
    ffn = None
    for name, module in model.named_modules():
        if type(module).__name__ == _ATTENTION:
            _adapt_attention(module)
        if type(module).__name__ != _BLOCK:
            continue
        experts: Any = module.experts
        shapes = {"up": tuple(experts.gate_up_proj.shape[1:]), "down": tuple(experts.down_proj.shape[1:])}
        ffn = ffn or GatedFFN(shapes, dtype, _Gate(experts.act_fn), transposed=True, weighs_input=True)
        for parameter, _ in list(experts.named_parameters(recurse=False)):
            setattr(experts, parameter, torch.nn.Parameter(torch.empty(0), requires_grad=False))
        module.forward = _Block(moe, len(names), module)  # type: ignore[assignment]
        names.append(f"{name}.experts")
    assert ffn is not None
    return names, ffn


class _Gate:
    """``up * act(gate)``, gate first."""

    def __init__(self, act: Any) -> None:
        self.act = act

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        out: torch.Tensor = up * self.act(gate)
        return out


class _Block:
    """The block's forward: its router's choice, the elastic experts, the shared expert."""

    def __init__(self, moe: Callable[..., torch.Tensor], layer: int, block: Any) -> None:
        self.moe, self.layer, self.block = moe, layer, block

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        block = self.block
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = functional.linear(hidden_TH, block.router.weight)
        top_TK, topk_TK = torch.topk(logits_TE, block.top_k, dim=1)
        weights_TK = torch.sigmoid(top_TK.float()).to(logits_TE.dtype)
        routed_TH = self.moe(self.layer, hidden_TH, topk_TK, weights_TK)
        return block.shared_expert(hidden_TH) + routed_TH, logits_TE


def _adapt_attention(module: Any) -> None:
    chunked = module.config.layer_types[module.layer_idx] == "chunked_attention"
    module.moeless_chunk = module.config.attention_chunk_size if chunked else None
    if module.attn_temperature_tuning and not module.use_rope:
        # by the token's position, in place of the family's own scaling by the row
        module.attn_temperature_tuning = False
        module.moeless_query_scale = _QueryScale(float(module.floor_scale), float(module.attn_scale))


class _QueryScale:
    """Temperature tuning of the layers without rotary angles (arXiv 2501.19399), by position."""

    def __init__(self, floor_scale: float, attn_scale: float) -> None:
        self.floor_scale, self.attn_scale = floor_scale, attn_scale

    def __call__(self, position_T: torch.Tensor) -> torch.Tensor:
        steps_T = torch.floor((position_T.float() + 1.0) / self.floor_scale)
        return torch.log1p(steps_T) * self.attn_scale + 1.0
