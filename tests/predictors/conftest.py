"""A small made model whose routing follows from its gate inputs, as a trace with its checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moeless.spec import MoESpec, preset
from moeless.traces import RequestRows, TokenTrace, TokenTraceWriter, TraceInfo, open_trace

L, E, K, H = 4, 8, 2, 16


@dataclasses.dataclass(frozen=True)
class Made:
    trace: TokenTrace
    path: Path
    model: Path
    spec: MoESpec
    gate_LEH: torch.Tensor


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Forty requests of four categories; a layer's input is the one before, turned a little and disturbed."""
    root = tmp_path_factory.mktemp("predictors")
    spec = dataclasses.replace(
        preset("bundled"),
        name="made",
        hidden_size=H,
        num_layers=L,
        moe_layers=tuple(range(L)),
        num_experts=E,
        top_k=K,
    )
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gate_LEH = normal(L, E, H) * 0.5
    turn_LHH = torch.linalg.qr(torch.eye(H) + 0.3 * normal(L, H, H)).Q
    topic_CH = normal(4, H)
    info = TraceInfo(
        kind="tokens", spec=spec, source={"model": str(root / "model")}, has_weights=False,
        router_input_dtype="float16",
    )  # fmt: skip
    writer = TokenTraceWriter(root / "trace", info)
    for request in range(40):
        rows, category = 30 + request % 7, request % 4
        state = normal(rows, H) + topic_CH[category]
        inputs = []
        for layer in range(L):
            state = state @ turn_LHH[layer] + 0.2 * normal(rows, H)
            inputs.append(state)
        input_TLH = torch.stack(inputs, 1).to(torch.float16)
        logits = torch.einsum("tlh,leh->tle", input_TLH.float(), gate_LEH)
        topk = logits.topk(K, -1).indices.numpy().astype(np.uint16)
        writer.append([RequestRows(request, topk, 20, rows - 20, input_TLH=input_TLH, category=f"c{category}")])
    writer.close()
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    names = {f"model.layers.{i}.block_sparse_moe.gate.weight": gate_LEH[i].contiguous() for i in range(L)}
    save_file(names, root / "model" / "model.safetensors")
    trace = open_trace(root / "trace")
    assert isinstance(trace, TokenTrace)
    return Made(trace, root / "trace", root / "model", spec, gate_LEH)
