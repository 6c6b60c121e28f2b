"""A Megatron-core ``GPTModel`` whose MoE layers are elastic, with flat batching.

Megatron keeps its parallel state, layers, projections, norms and router, and hands its inference context down; the
layer spec swaps in the elastic MoE layer, a router that stays on the model's device, and attention that reads the
context (:mod:`moeless.engine.hosts.megatron_context`).

Axes: T tokens of a step, H hidden, E experts, K top-k.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from moeless.engine.checkpoint import Checkpoint, read_expert
from moeless.engine.ffn import GatedFFN, silu_gate
from moeless.engine.flat import FlatBatch, KVCache
from moeless.engine.hosts.base import Host
from moeless.engine.hosts.megatron_context import (
    FlatContext,
    FlatCoreAttention,
    FlatRotary,
    FlatSelfAttention,
    inference,
)
from moeless.engine.hosts.megatron_release import accepted, quiet
from moeless.engine.hosts.megatron_weights import Family, family_of, load_weights
from moeless.files import read_json
from moeless.spec import MoESpec


class DeviceRouter(TopKRouter):
    """Megatron's router without its move of the weights to CUDA."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits in the configured type."""
        kind = torch.float32 if self.config.moe_router_dtype == "fp32" else input.dtype
        return functional.linear(input.to(kind), self.weight.to(kind))


class ElasticMoELayer(MegatronModule):
    """Router, then the host's elastic experts; it owns no expert weights.

    Attributes:
        host, layer: whose experts, and which MoE layer's, counted from 0; set by the host.
    """

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, **given: Any) -> None:
        super().__init__(config=config)
        given["pg_collection"] = pg_collection or get_default_pg_collection()
        # what a release tells its own MoE layer is for the router, as far as that has a name for it
        self.router = DeviceRouter(config=config, **accepted(TopKRouter, given))
        self.host: MegatronHost | None = None
        self.layer = 0

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron's layers count from 1."""
        self.router.set_layer_number(layer_number)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """``[T, 1, H]`` to the same."""
        assert self.host is not None
        probs_TE, map_TE = self.router(hidden_states)
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        # not by nonzero(), whose size the host would have to wait for
        topk_TK = map_TE.to(torch.uint8).topk(self.router.topk, dim=1).indices.sort(dim=1).values
        out = self.host.moe(self.layer, hidden_TH, topk_TK, probs_TE.gather(1, topk_TK))
        return out.view(hidden_states.shape), None


class MegatronHost(Host):
    """Mixtral-, Qwen3-MoE- and OLMoE-type checkpoints in a ``GPTModel``.

    Raises:
        UserError: the checkpoint's family or one of its settings is not supported here, or it is damaged.
    """

    def __init__(self, folder: Path, *, spec: MoESpec, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.spec, self.cache = device, dtype, spec, KVCache()
        self.checkpoint = Checkpoint(folder)
        config = read_json(folder / "config.json")
        self.family = family_of(config, spec, folder)
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(
                expert_model_parallel_size=dist.get_world_size(), create_gloo_process_groups=False
            )
        self.model = _build(self.family, dtype)
        load_weights(self.model, self.checkpoint, self.family)
        self.model.to(device=device, dtype=dtype).eval()
        self.model.rotary_pos_emb = FlatRotary(self.family.head_dim, self.family.rope_theta, device)
        self.context = FlatContext(self.cache, self.family.max_positions, self.family.window)
        self.model.output_layer.register_forward_pre_hook(self.context.wanted)
        for layer, module in enumerate(m for m in self.model.modules() if isinstance(m, ElasticMoELayer)):
            module.layer, module.host = layer, self
        up, down = (2 * self.family.expert_size, self.family.hidden), (self.family.hidden, self.family.expert_size)
        self.ffn = GatedFFN({"up": up, "down": down}, dtype, silu_gate)

    def read_expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        return read_expert(self.checkpoint, f"model.layers.{layer}.mlp.experts", expert)

    def step(self, batch: FlatBatch) -> torch.Tensor:
        self.context.batch = batch
        with torch.inference_mode(), inference():
            out = self.model(
                input_ids=batch.token_T[None],
                position_ids=batch.position_T[None],
                attention_mask=None,
                inference_context=self.context,
                runtime_gather_output=True,
            )
        logits: torch.Tensor = out[0].float()
        return logits


def _build(family: Family, dtype: torch.dtype) -> GPTModel:
    quiet()
    config = TransformerConfig(
        num_layers=family.layers,
        hidden_size=family.hidden,
        num_attention_heads=family.heads,
        num_query_groups=family.kv_heads,
        kv_channels=family.head_dim,
        ffn_hidden_size=family.expert_size,
        moe_ffn_hidden_size=family.expert_size,
        num_moe_experts=family.experts,
        moe_router_topk=family.top_k,
        moe_router_load_balancing_type="none",
        moe_router_score_function="softmax",
        moe_router_pre_softmax=not family.renormalised or family.top_k == 1,
        moe_router_topk_scaling_factor=None,
        normalization="RMSNorm",
        layernorm_epsilon=family.epsilon,
        qk_layernorm=family.qk_norm is not None,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=functional.silu,
        rotary_interleaved=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        apply_query_key_layer_scaling=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
    )
    layer = get_gpt_layer_local_spec(
        num_experts=family.experts, qk_layernorm=family.qk_norm == "head", normalization="RMSNorm"
    )
    layer.submodules.mlp = ModuleSpec(module=ElasticMoELayer)
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = FlatCoreAttention
    layer.submodules.self_attention.module = FlatSelfAttention
    if family.qk_norm == "all":
        attention.q_layernorm = ModuleSpec(module=AllHeadsNorm, params={"heads": family.heads})
        attention.k_layernorm = ModuleSpec(module=AllHeadsNorm, params={"heads": family.kv_heads})
    return GPTModel(
        config=config,
        transformer_layer_spec=layer,
        vocab_size=family.vocab,
        max_sequence_length=family.max_positions,
        parallel_output=False,
        share_embeddings_and_output_weights=family.tied,
        position_embedding_type="rope",
        rotary_base=int(family.rope_theta),
    )


class AllHeadsNorm(torch.nn.Module):
    """RMS norm over all heads of a query or key together (OLMoE)."""

    def __init__(self, config: Any, hidden_size: int, eps: float, heads: int, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(heads * hidden_size, dtype=config.params_dtype))
        self.eps = eps

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """``[T, 1, heads, D]`` to the same."""
        flat = value.reshape(*value.shape[:2], -1)
        return functional.rms_norm(flat, flat.shape[-1:], self.weight, self.eps).view(value.shape)
