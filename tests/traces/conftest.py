"""Small specs and traces of each kind, as fixtures that return makers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeless.spec import Attention, MoESpec
from moeless.traces import CountsTraceWriter, IterationTraceWriter, RequestRows, TokenTraceWriter, TraceInfo


def _spec(**changes: Any) -> MoESpec:
    values: dict[str, Any] = {
        "name": "small",
        "hidden_size": 8,
        "num_layers": 4,
        "moe_layers": (1, 2, 3),
        "num_experts": 6,
        "top_k": 2,
        "expert_intermediate_size": 8,
        "attention": Attention(heads=2, kv_heads=1, head_dim=4),
        "vocab_size": 32,
    }
    return MoESpec(**(values | changes))


def _topk(rng: np.random.Generator, tokens: int, spec: MoESpec) -> np.ndarray:
    scores = rng.random((tokens, spec.L, spec.E))
    return np.argsort(-scores, axis=-1)[..., : spec.K].astype(np.uint16)


@pytest.fixture
def make_spec() -> Callable[..., MoESpec]:
    return _spec


@pytest.fixture
def random_topk() -> Callable[..., np.ndarray]:
    return _topk


@pytest.fixture
def spec() -> MoESpec:
    return _spec()


@pytest.fixture
def make_tokens(tmp_path: Path) -> Callable[..., Path]:
    """Write a token trace of requests with (prompt, decode) rows."""

    def make(lengths: list[tuple[int, int]], *, seed: int = 0, shard_rows: int = 50, name: str = "tokens") -> Path:
        spec, rng = _spec(), np.random.default_rng(seed)
        info = TraceInfo("tokens", spec, {"model": "test"}, seed=seed)
        writer = TokenTraceWriter(tmp_path / name, info, shard_rows=shard_rows)
        for request, (prompt, decode) in enumerate(lengths):
            rows = prompt + decode
            writer.append(
                [
                    RequestRows(
                        request,
                        _topk(rng, rows, spec),
                        prompt,
                        decode + 1,
                        weights_TLK=rng.random((rows, spec.L, spec.K)).astype(np.float16),
                        token_T=rng.integers(0, 32, rows),
                        category="ab"[request % 2],
                        source_id=f"s{request}",
                    )
                ]
            )
        writer.close()
        return tmp_path / name

    return make


@pytest.fixture
def make_iterations(tmp_path: Path) -> Callable[..., Path]:
    def make(iterations: int = 7, name: str = "iterations") -> Path:
        spec, rng = _spec(), np.random.default_rng(1)
        info = TraceInfo("iterations", spec, {"importer": "test"}, has_weights=False)
        writer = IterationTraceWriter(tmp_path / name, info)
        for iteration in range(iterations):
            for rank in range(2):
                rows = int(rng.integers(1, 9))
                writer.append(iteration, rank, 1, _topk(rng, rows, spec), position_T=np.arange(rows))
        writer.close()
        return tmp_path / name

    return make


@pytest.fixture
def make_counts(tmp_path: Path) -> Callable[..., Path]:
    def make(iterations: int = 9, name: str = "counts") -> Path:
        spec, rng = _spec(), np.random.default_rng(2)
        info = TraceInfo("counts", spec, {"importer": "test"})
        writer = CountsTraceWriter(tmp_path / name, info, shard_rows=4)
        for iteration in range(iterations):
            topk = _topk(rng, 20, spec)
            load = np.stack([np.bincount(topk[:, layer].ravel(), minlength=spec.E) for layer in range(spec.L)])
            writer.append([iteration], [255], load[None], [20])
        writer.close()
        return tmp_path / name

    return make


@pytest.fixture
def token_trace(make_tokens: Callable[..., Path]) -> Path:
    return make_tokens([(7, 5), (1, 1), (30, 0), (2, 40), (9, 9), (12, 3)])
