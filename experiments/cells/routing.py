"""Cells computed from a routing trace alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moeless.traces import TokenTrace, open_trace, require_kind
from moeless.traces.compose import range_loads
from moeless.workloads import arrivals, lengths


def _open(path: Path) -> TokenTrace:
    trace = open_trace(path)
    require_kind(trace, "tokens", command="reproduce")
    assert isinstance(trace, TokenTrace)
    return trace


def describe(trace: TokenTrace) -> dict[str, Any]:
    """What a figure must say about its source."""
    return {
        "model": trace.spec.name,
        "synthetic": bool(trace.info.synthetic),
        "requests": trace.num_requests,
        "tokens": trace.num_tokens,
    }


def popularity(params: dict[str, Any], needs: list[Any]) -> dict[str, Any]:
    """Load of each expert over the whole trace, ``load_LE`` in tokens."""
    trace = _open(needs[0])
    stop = np.array([trace.num_rows], np.int64)
    load_LSE = range_loads(trace.load_topk(), np.zeros(1, np.int64), stop, np.zeros(1, np.int64), trace.spec.E, 1)
    return {**describe(trace), "load_LE": load_LSE[:, 0].tolist()}


def over_time(params: dict[str, Any], needs: list[Any]) -> dict[str, Any]:
    """One-second batches of an arrival process: requests, tokens, active experts of each second.

    Active experts are those with at least one token, averaged over layers: in the batch's prefill, and averaged
    over its decode steps too (null where it has none).
    Params: ``arrivals``, ``seconds``, ``request_rate`` (None keeps the process's own), ``seed``.
    """
    trace = _open(needs[0])
    series = arrivals.load(
        params["arrivals"], duration=params["seconds"], request_rate=params["request_rate"], seed=params["seed"]
    )
    workload = lengths.join(series, trace.requests, trace.num_rows, seed=params["seed"])
    topk_TLK = trace.load_topk()
    second_N = np.array([int(request.arrival) for request in workload.requests], np.int64)
    rows: list[list[Any]] = []
    for second in range(int(params["seconds"])):
        batch = [request for request, at in zip(workload.requests, second_N.tolist(), strict=True) if at == second]
        if not batch:
            rows.append([second, 0, 0, None, None])
            continue
        base = workload.base_N[[request.id for request in batch]]
        prompt = np.array([request.prompt_tokens for request in batch], np.int64)
        output = np.array([request.output_tokens for request in batch], np.int64)
        prefill = np.concatenate([np.arange(b, b + p) for b, p in zip(base.tolist(), prompt.tolist(), strict=True)])
        decode = []
        for step in range(int(output.max()) - 1):
            alive = output - 1 > step
            decode.append(_active(topk_TLK[(base + prompt + step)[alive]], trace.spec.E))
        tokens = int(prompt.sum() + (output - 1).sum())
        active = _active(topk_TLK[prefill], trace.spec.E)
        rows.append([second, len(batch), tokens, active, float(np.mean(decode)) if decode else None])
    return {**describe(trace), "experts": trace.spec.E, "rows": rows, "arrivals": series.name}


def _active(topk_TLK: Any, num_experts: int) -> float:
    """Mean over layers of the number of experts with a token."""
    layers = topk_TLK.shape[1]
    used = np.zeros((layers, num_experts), np.bool_)
    used[np.arange(layers)[None, :, None], topk_TLK] = True
    return float(used.sum(1).mean())
