"""Fitting synthetic routing to real routing, with a report of how close it comes on held-out requests."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeless.contracts import IntArray
from moeless.errors import UserError
from moeless.traces import statistics as st
from moeless.traces.store import TokenTrace, open_trace
from moeless.traces.synthetic import SyntheticParams, write_synthetic

#: Decode batches at which imbalance is compared.
BATCHES = (16, 64, 256)
_GRID: dict[str, tuple[float, ...]] = {
    "token": (0.4, 0.8, 1.2, 1.6, 2.0, 2.6, 3.5, 5.0),
    "persistence": (0.0, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95),
    "request": (0.0, 0.2, 0.35, 0.5, 0.7, 0.9, 1.2),
    "category": (0.1, 0.25, 0.4, 0.6, 0.8),
    "popularity": (0.2, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6),
    "neighbour": (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95),
}


@dataclass(frozen=True)
class Calibration:
    """Fitted parameters, and rows of (measure, real on held-out requests, synthetic)."""

    params: SyntheticParams
    report: tuple[tuple[str, float, float], ...]


def measures(trace: TokenTrace, requests: IntArray, *, gpus: int, seed: int = 0) -> dict[str, float]:
    """Popularity, imbalance, persistence and next-layer predictability of some of a trace's requests."""
    topk, spec = trace.load_topk(), trace.spec
    first, length = trace.requests.first_row[requests], trace.rows_N[requests]
    rows = np.concatenate([np.arange(a, a + n) for a, n in zip(first, length, strict=True)])
    ends = np.cumsum(length)
    own, begin = topk[rows], ends - length
    loads = st.request_loads(own, begin, length, spec.E)
    rng = np.random.default_rng(seed)
    made = {
        "busiest expert over even share": float((st.shares(loads.sum(axis=0)).max(axis=1) * spec.E).mean()),
        "imbalance of one request": float(st.imbalance_L(loads, gpus).mean()),
        "imbalance of 16 requests": float(st.imbalance_L(st.pooled(loads, 16, 60, rng), gpus).mean()),
    }
    for batch in BATCHES:
        chosen = rng.integers(0, len(requests), (60, batch))
        tokens = begin[chosen] + np.floor(rng.random(chosen.shape) * length[chosen]).astype(np.int64)
        window = st.window_loads(own, tokens, spec.E)
        made[f"imbalance of a decode step of {batch}"] = float(st.imbalance_L(window, gpus).mean())
    owner = np.repeat(np.arange(len(requests)), length)
    for lag in (1, 16):
        pairs = np.flatnonzero(owner[:-lag] == owner[lag:])[:20_000]
        if len(pairs):
            made[f"overlap of tokens {lag} apart"] = float(st.overlap_L(own[pairs], own[pairs + lag]).mean())
    sample = rng.permutation(len(own))[:20_000]
    if spec.L > 1:
        made["next layer known better by"] = float(np.nanmean(st.next_layer_gain_L(own[sample], spec.E)))
    return made


def _error(real: dict[str, float], other: dict[str, float]) -> float:
    """Sum of squared relative differences; the excess over 1 for ratios that cannot be below it."""
    total = 0.0
    for name, value in real.items():
        base = 1.0 if name.startswith(("imbalance", "busiest")) else 0.0
        total += ((other.get(name, 0.0) - value) / max(value - base, 0.05)) ** 2
    return total


def calibrate(
    trace: TokenTrace, *, gpus: int = 8, sample_requests: int = 60, rounds: int = 2, seed: int = 0
) -> Calibration:
    """Fit by coordinate search on 70 % of the requests; report on the other 30 %.

    Raises:
        UserError: the trace has fewer than 20 requests, or fewer experts than GPUs.
    """
    if trace.num_requests < 20:
        raise UserError(f"calibration needs at least 20 requests, {trace.path} has {trace.num_requests}")
    gpus = min(gpus, trace.spec.E)
    order = np.random.default_rng(seed).permutation(trace.num_requests)
    cut = int(0.7 * len(order))
    real = measures(trace, np.sort(order[:cut]), gpus=gpus)
    held_out = measures(trace, np.sort(order[cut:]), gpus=gpus)
    length = float(trace.rows_N.mean())
    categories = max(1, min(len({name for name in trace.requests.category if name}), 64))
    params = SyntheticParams(categories=categories, prompt_tokens=max(1.0, length / 2), output_tokens=length / 2 + 1)
    best, error = params, np.inf
    for _ in range(rounds):
        for name, values in _GRID.items():
            for value in dict.fromkeys((getattr(best, name), *values)):
                tried = dataclasses.replace(best, **{name: value})
                found = _error(real, _generated(trace, tried, sample_requests, gpus, seed))
                if found < error:
                    best, error = tried, found
    made = _generated(trace, best, max(sample_requests, trace.num_requests // 3), gpus, seed + 1)
    return Calibration(best, tuple((name, held_out[name], made.get(name, float("nan"))) for name in held_out))


def _generated(trace: TokenTrace, params: SyntheticParams, requests: int, gpus: int, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "trace"
        write_synthetic(out, trace.spec, requests=requests, params=params, seed=seed)
        opened: Any = open_trace(out)
        return measures(opened, np.arange(requests), gpus=gpus)
