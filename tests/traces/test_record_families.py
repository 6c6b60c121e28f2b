"""Recording equals what the experts of many model families are asked to do, token by token.

Each family is the real Transformers class with a tiny random configuration. A batch with padding is
recorded in prefill and decode with a KV cache; the reference is one full forward pass per request,
without cache or padding, observed through the experts interface (a registered experts function)
instead of the recorder's hooks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moeless.traces import TokenTrace, open_trace
from moeless.traces.hf_model import LoadedModel, model_classes
from moeless.traces.hf_spec import find_blocks
from moeless.traces.recorder import RecordSettings, record

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
NAMED = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = NAMED | {"shared_expert_intermediate_size": 24}
GROUPED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
DENSE_FIRST = GROUPED | {"first_k_dense_replace": 1, "num_hidden_layers": 3}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
# as many indexed tokens as there are: sparse attention then sees what dense attention sees
SPARSE = {"index_topk": 64, "index_n_heads": 2, "index_head_dim": 16}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
HEAD = {"head_dim": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": LOCAL,
    "Phimoe": LOCAL,
    "Llama4Text": LOCAL | HEAD | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "num_hidden_layers": 4},
    "GptOss": LOCAL | HEAD,
    "Qwen3Moe": NAMED | HEAD,
    "DeepseekV3": DENSE_FIRST | LATENT | {"n_group": 2},
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "Qwen2Moe": SHARED,
    "FlexOlmo": {"num_experts": 6, "num_experts_per_tok": 2},
    "DeepseekV2": DENSE_FIRST | LATENT | {"n_routed_experts": 6},
    "DeepseekV32": DENSE_FIRST | LATENT | SPARSE | {"n_group": 2},
    "GlmMoeDsa": DENSE_FIRST | LATENT | SPARSE,
    "Dots1": DENSE_FIRST | HEAD,
    "Glm4Moe": DENSE_FIRST | HEAD,
    "Glm4MoeLite": DENSE_FIRST | LATENT,
    "Ernie4_5_Moe": {
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "num_hidden_layers": 3,
    },
    "GraniteMoe": LOCAL,
    "GraniteMoeShared": LOCAL | {"shared_intermediate_size": 24},
    "GraniteMoeHybrid": LOCAL
    | {
        "shared_intermediate_size": 24,
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
        "mamba_d_head": 8,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "layer_types": ["mamba", "attention"],
    },
    "HunYuanMoEV1": {"num_experts": 6, "moe_topk": 2, "moe_intermediate_size": 24} | HEAD,
    "Jamba": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "Lfm2Moe": NAMED
    | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "MiniMax": LOCAL | HEAD | {"layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "MiniMaxM2": LOCAL | HEAD,
    "Qwen3Next": SHARED | HEAD | LINEAR,
    "Qwen3_5MoeText": SHARED | HEAD | LINEAR,
    "Afmoe": NAMED
    | HEAD
    | {
        "num_dense_layers": 1,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "Cohere2Moe": {"num_experts": 6, "num_experts_per_tok": 2} | HEAD,
    "ExaoneMoe": NAMED
    | HEAD
    | {"n_group": 1, "topk_group": 1, "num_shared_experts": 1, "first_k_dense_replace": 1, "num_hidden_layers": 3},
    "NemotronH": GROUPED
    | HEAD
    | {
        "hybrid_override_pattern": "*EME",
        "num_hidden_layers": 4,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 16,
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 24,
    },
    "SolarOpen": GROUPED | HEAD | {"first_k_dense_replace": 0},
    "Mellum": NAMED | HEAD,
    "Laguna": SHARED | HEAD,
    "MiMoV2Flash": GROUPED | HEAD,
    "Mistral4": GROUPED | LATENT | {"first_k_dense_replace": 0},
}
PROMPTS = [
    SimpleNamespace(text="the quick brown fox", category="a", source_id="0"),
    SimpleNamespace(text="abc", category="b", source_id="1"),
    SimpleNamespace(text="once upon a", category="a", source_id="2"),
]


class Letters:
    """A tokenizer of one token per letter."""

    chat_template = None
    pad_token_id = 0
    eos_token_id = None
    bos_token_id = 1

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 90 + 3 for letter in text]}


@contextmanager
def observed_experts(model: Any) -> Iterator[dict[int, tuple[Any, Any]]]:
    """What each layer's experts are asked for, seen through a registered experts function."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    seen: dict[int, tuple[Any, Any]] = {}
    blocks = find_blocks(model)
    if blocks[0].experts is None:
        # Llama-4: the experts see inputs scaled by their score, zero where they were not chosen
        def dense(block: Any, args: Any, result: Any) -> None:
            scores = block.router(args[0].reshape(-1, args[0].shape[-1]))[0]
            values, ids = scores.topk(block.top_k, dim=1)
            seen[layer_of[id(block)]] = (ids, values)

        layer_of = {id(block.block): block.layer for block in blocks}
        handles = [block.block.register_forward_hook(dense) for block in blocks]
        yield seen
        for handle in handles:
            handle.remove()
        return
    layer_of = {id(block.experts): block.layer for block in blocks}

    def spy(module: Any, hidden: Any, ids: Any, weights: Any, *rest: Any, **named: Any) -> Any:
        seen[layer_of[id(module)]] = (ids.clone(), weights.clone())
        return type(module).forward.__wrapped__(module, hidden, ids, weights, *rest, **named)

    ALL_EXPERTS_FUNCTIONS.register("spy", spy)
    before = {id(block.experts): block.experts.config._experts_implementation for block in blocks}
    for block in blocks:
        block.experts.config._experts_implementation = "spy"
    yield seen
    for block in blocks:
        block.experts.config._experts_implementation = before[id(block.experts)]


def build(name: str) -> Any:
    import transformers

    config_class = getattr(transformers, f"{name}Config", None)
    if config_class is None:
        pytest.skip(f"this version of Transformers has no {name}")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_class(**(COMMON | FAMILIES[name]))
        return model_classes(config)[0].from_config(config).eval().float()


@pytest.mark.parametrize("name", list(FAMILIES))
def test_recorded_routing_is_what_the_experts_are_asked_for(name: str, tmp_path: Path) -> None:
    model = build(name)
    loaded = LoadedModel(model, Letters(), name, {"model": name})
    record(loaded, PROMPTS, tmp_path / "t", RecordSettings(max_new_tokens=6, batch_size=3))
    trace = open_trace(tmp_path / "t", check=True)
    assert isinstance(trace, TokenTrace)
    assert trace.num_tokens == sum(len(prompt.text) + 5 for prompt in PROMPTS)
    layers = trace.spec.moe_layers
    for index, prompt in enumerate(PROMPTS):
        rows = trace.rows(index)
        assert trace.token_T[rows][: len(prompt.text)].tolist() == Letters()(prompt.text)["input_ids"]
        with observed_experts(model) as seen, torch.inference_mode():
            model(torch.from_numpy(trace.token_T[rows].astype(np.int64))[None], use_cache=False)
        assert sorted(seen) == list(layers)
        ids = np.stack([seen[layer][0].reshape(rows.stop - rows.start, -1).numpy() for layer in layers], axis=1)
        weights = np.stack([seen[layer][1].reshape(ids.shape[0], -1).numpy() for layer in layers], axis=1)
        np.testing.assert_array_equal(trace.topk(rows.start, rows.stop), ids)
        np.testing.assert_allclose(trace.weights(rows.start, rows.stop), weights, rtol=2e-3, atol=2e-3)


def test_spec_counts_the_models_parameters() -> None:
    from moeless.traces.hf_spec import spec_of_model

    for name in ("Mixtral", "GptOss", "Qwen3Moe", "DeepseekV3", "Llama4Text", "GraniteMoeShared"):
        model = build(name)
        spec = spec_of_model(model, name)
        actual = sum(weight.numel() for weight in model.parameters())
        # norms of queries, router biases and sinks are what a spec leaves out
        assert spec.total_params == pytest.approx(actual, rel=0.01), name


def test_a_dense_model_is_refused_by_name() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from moeless.errors import UserError
    from moeless.traces.hf_spec import spec_of_model

    with pytest.raises(UserError, match="LlamaForCausalLM has no MoE layer"):
        spec_of_model(LlamaForCausalLM(LlamaConfig(**COMMON)), "dense")
