"""A small real-format trace, and a way to set up a study on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeless.contracts import Policy
from moeless.simulator.bench import BenchConfig
from moeless.spec import Attention, MoESpec
from moeless.traces.info import TraceInfo
from moeless.traces.writers import RequestRows, TokenTraceWriter
from moeless.tuning import Tuning, TuningConfig

SPEC = MoESpec(
    name="small",
    hidden_size=256,
    num_layers=2,
    moe_layers=(0, 1),
    num_experts=8,
    top_k=2,
    expert_intermediate_size=512,
    attention=Attention(heads=4, kv_heads=2, head_dim=64),
    vocab_size=1000,
)


@pytest.fixture(scope="session")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Skewed routing of 20 requests of 4 prompt tokens and 6 outputs."""
    folder = tmp_path_factory.mktemp("tuning") / "trace"
    random = np.random.default_rng(0)
    weight = np.log(1.0 / np.arange(1, SPEC.E + 1))
    writer = TokenTraceWriter(folder, TraceInfo("tokens", SPEC, {"model": "test"}, seed=0, has_weights=False))
    for request in range(20):
        keys = weight + random.gumbel(size=(9, SPEC.L, SPEC.E))
        topk = np.argsort(-keys, axis=-1)[:, :, : SPEC.K].astype(np.uint16)
        writer.append([RequestRows(request, topk, 4, 6, source_id=f"s{request}")])
    writer.close()
    return folder


@pytest.fixture
def tuning_for(trace: Path, tmp_path: Path) -> Callable[..., Tuning]:
    """A study of six trials on the trace; keyword arguments replace its settings or those of its workload."""

    def make(**changes: Any) -> Tuning:
        bench = BenchConfig(
            trace=trace,
            policies=(Policy.parse("moeless:history"),),
            costs=("roofline",),
            arrivals="poisson:200",
            max_requests=8,
        )
        inner = {key: changes.pop(key) for key in list(changes) if hasattr(bench, key)}
        config = TuningConfig(replace(bench, **inner), 6, ("latency", "cost"), str(tmp_path / "studies.journal"), "s")
        return Tuning(replace(config, **changes))

    return make
