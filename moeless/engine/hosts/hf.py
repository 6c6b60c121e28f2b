"""Any Transformers family on the experts interface, with elastic experts and flat batching.

The model is built on the meta device; only tensors that are no expert's are read, so that a rank never holds more.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from moeless.engine.checkpoint import Checkpoint, read_expert
from moeless.engine.ffn import GatedFFN
from moeless.engine.flat import FlatBatch, KVCache, attend
from moeless.engine.hosts import llama4
from moeless.engine.hosts.base import Host
from moeless.errors import UserError
from moeless.spec import MoESpec

_NAME = "moeless-elastic"
_ATTENTION = "moeless-flat"


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over ``[1, heads, T, D]`` under the signature that Transformers calls."""
    host: TransformersHost = module.moeless_host
    scale_query = getattr(module, "moeless_query_scale", None)
    if scale_query is not None:
        query = (query * scale_query(host.batch.position_T)[:, None]).to(query.dtype)
    out = attend(
        module.layer_idx,
        host.cache,
        host.batch.spans,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        chunk=getattr(module, "moeless_chunk", None),
        softcap=softcap,
        sinks_H=s_aux,
    )
    return out[None], None


def _experts(module: Any, hidden: torch.Tensor, topk: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    host: TransformersHost = module.moeless_host
    return host.moe(module.moeless_layer, hidden, topk, weights)


class TransformersHost(Host):
    """A causal language model of Transformers.

    Raises:
        UserError: the folder holds no such model, its family has no experts interface, or its checkpoint's tensors
            are named in a way that is not known.
    """

    def __init__(self, folder: Path, *, spec: MoESpec, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)
        ALL_EXPERTS_FUNCTIONS.register(_NAME, _experts)
        self.device, self.dtype, self.cache = device, dtype, KVCache()
        self.checkpoint = Checkpoint(folder)
        self.spec = spec
        config = AutoConfig.from_pretrained(folder).get_text_config()
        if getattr(config, "quantization_config", None):
            raise UserError(f"{folder} is quantised; the live engine reads float32, float16 and bfloat16 checkpoints")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.set_attn_implementation(_ATTENTION)
        self.model = model.eval()
        self.batch = FlatBatch((), *(torch.empty(0, dtype=torch.int64),) * 3)
        if llama4.is_llama4(model):
            self._experts, self.ffn = llama4.adapt(lambda *given: self.moe(*given), model, dtype)
        else:
            try:
                model.set_experts_implementation(_NAME)
            except (ValueError, AttributeError, KeyError):
                raise UserError(
                    f"{config.model_type} does not use Transformers' experts interface; the live engine cannot serve it"
                ) from None
            self._experts = self._take_experts(config.model_type)
        self._load_rest()
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.moeless_host = self

    def _take_experts(self, family: str) -> list[str]:
        """Mark the experts modules with their layer, leave them without weights, learn their shapes."""
        found = [
            (name, module)
            for name, module in self.model.named_modules()
            if hasattr(module, "down_proj") and hasattr(module, "_apply_gate") and hasattr(module, "num_experts")
        ]
        if len(found) != self.spec.L:
            raise UserError(
                f"{family} has {self.spec.L} MoE layers, of which {len(found)} use Transformers' experts interface; "
                "the live engine cannot serve it"
            )
        names = []
        for layer, (name, module) in enumerate(found):
            up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
            weights = {"up": up, "down": "down_proj"}
            if getattr(module, "has_bias", False):
                weights |= {"up_bias": f"{up}_bias", "down_bias": "down_proj_bias"}
            shapes = {ours: tuple(getattr(module, theirs).shape[1:]) for ours, theirs in weights.items()}
            if layer == 0:
                activate = module._apply_gate if getattr(module, "has_gate", True) else module.act_fn
                self.ffn = GatedFFN(shapes, self.dtype, activate, bool(getattr(module, "is_transposed", False)))
            elif dict(self.ffn.shapes) != shapes:
                raise UserError(f"the MoE layers of this {family} differ in shape; the live engine needs equal ones")
            for parameter, _ in list(module.named_parameters(recurse=False)):
                setattr(module, parameter, torch.nn.Parameter(torch.empty(0), requires_grad=False))
            module.moeless_host, module.moeless_layer = self, layer
            names.append(name)
        return names

    def _load_rest(self) -> None:
        wanted = dict(self.model.named_parameters(remove_duplicate=False))
        wanted |= dict(self.model.named_buffers(remove_duplicate=False))
        missing = []
        state = {}
        for key in self.model.state_dict():
            if wanted[key].device.type != "meta":
                continue
            stored = self.checkpoint.find(key)
            if stored is None:
                missing.append(key)
                continue
            kind = wanted[key].dtype
            state[key] = self.checkpoint.read(stored).to(self.device, kind)
        self.model.load_state_dict(state, strict=False, assign=True)
        self.model.tie_weights()
        missing = [key for key in missing if _get(self.model, key).device.type == "meta"]
        if missing:
            raise UserError(f"the checkpoint {self.checkpoint.folder} has no tensor for {missing[0]}")
        for module in self.model.modules():
            if any(buffer.device.type == "meta" for buffer in module.buffers(recurse=False)):
                fresh = type(module)(module.config)  # rotary tables are computed, not stored
                for name, buffer in fresh.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(self.device))

    def read_expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        return read_expert(self.checkpoint, self._experts[layer], expert)

    def step(self, batch: FlatBatch) -> torch.Tensor:
        self.batch = batch
        with torch.inference_mode():
            out = self.model(
                input_ids=batch.token_T[None],
                position_ids=batch.position_T[None],
                use_cache=False,
                logits_to_keep=batch.logit_rows,
            )
        return out.logits[0].float()


def _get(model: Any, key: str) -> torch.Tensor:
    with contextlib.suppress(AttributeError):
        return model.get_parameter(key)
    return model.get_buffer(key)
