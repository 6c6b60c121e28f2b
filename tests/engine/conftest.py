"""Tiny random models of real families, and jobs on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeless.cluster import cluster
from moeless.contracts import Request
from moeless.engine.forkserver import ForkServer
from moeless.engine.job import Job
from moeless.engine.serving import LiveRequest
from moeless.engine.start import launch

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def _save(kind: str, folder: Path) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SMALL, head_dim=8, num_local_experts=6, num_experts_per_tok=2)
        model = transformers.MixtralForCausalLM(config)
    elif kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **SMALL, head_dim=16, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True
        )
        model = transformers.Qwen3MoeForCausalLM(config)
    elif kind == "olmoe":
        config = transformers.OlmoeConfig(**SMALL, num_experts=6, num_experts_per_tok=2, norm_topk_prob=False)
        model = transformers.OlmoeForCausalLM(config)
    elif kind == "llama4":
        # chunked and full attention, a dense layer, weights that scale two experts' inputs, query scaling by position
        config = transformers.Llama4TextConfig(
            **SMALL | {"num_hidden_layers": 4},
            intermediate_size_mlp=40,
            head_dim=8,
            num_local_experts=6,
            num_experts_per_tok=2,
            moe_layers=[0, 2, 3],
            no_rope_layers=[1, 0, 1, 0],
            attention_chunk_size=5,
            floor_scale=4,
            attn_scale=0.5,
        )
        # the text model within a multimodal one, whose tensors carry its name before theirs
        vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        widths = ("vision_output_dim", "projector_input_dim", "projector_output_dim")
        vision |= {"image_size": 28, "patch_size": 14} | dict.fromkeys(widths, 16)
        whole = transformers.Llama4Config(text_config=config.to_dict(), vision_config=vision)
        model = transformers.Llama4ForConditionalGeneration(whole)
    else:
        config = transformers.GptOssConfig(
            **SMALL, head_dim=8, num_local_experts=6, num_experts_per_tok=2, sliding_window=8, layer_types=None
        )
        model = transformers.GptOssForCausalLM(config)
        model = model.float()
    for name, parameter in model.named_parameters():
        # larger weights than the families' initial ones, so that a wrong expert or position shows
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.15)
    model.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model folder by family, made once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = _save(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


@pytest.fixture
def make_job(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Job]:
    """A job over random prompts of mixed lengths."""
    from moeless.traces.specs import resolve_spec

    def make(kind: str = "mixtral", ranks: int = 2, count: int = 5, **changes: Any) -> Job:
        folder = tiny(kind)
        spec = dataclasses.replace(resolve_spec(str(folder)), dtype="float32", expert_dtype="float32")
        random = np.random.default_rng(1)
        requests = []
        for index in range(count):
            prompt, output = int(random.integers(1, 20)), int(random.integers(1, 6))
            tokens = tuple(int(t) for t in random.integers(0, SMALL["vocab_size"], prompt))
            requests.append(LiveRequest(Request(index, 0.001 * index, prompt, output), tokens))
        values: dict[str, Any] = {
            "model": folder,
            "host": "transformers",
            "device": "cpu",
            "dtype": "float32",
            "ranks": ranks,
            "spec": spec,
            "cluster": cluster("cpu8").with_gpus(ranks),
            "costs": "roofline",
            "policies": ("static",),
            "requests": tuple(requests),
            "folder": tmp_path,
            "shared": tmp_path,
            "token_budget": 24,
            "verify": True,
            "timeout_seconds": 60.0,
        }
        return Job(**(values | changes))

    return make


@pytest.fixture(scope="session")
def start_server() -> Callable[[], ForkServer]:
    """Starts a process that forks ranks and finds the work in this folder."""

    def start() -> ForkServer:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(Path(__file__).parent)
            return ForkServer()

    return start


@pytest.fixture(scope="session")
def server(start_server: Callable[[], ForkServer]) -> Iterator[ForkServer]:
    """One process that forks the ranks of all tests."""
    with start_server() as started:
        yield started


@pytest.fixture
def serve(server: ForkServer) -> Callable[[Job], None]:
    """Run a job's ranks."""
    return lambda job: launch(job, "fork", server)
