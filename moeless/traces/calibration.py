"""Fitting synthetic routing to real routing, with a report of how close it comes on held-out requests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import IntArray
from moeless.errors import UserError
from moeless.spec import MoESpec
from moeless.traces import statistics as st
from moeless.traces.store import TokenTrace
from moeless.traces.synthetic import SyntheticParams, synthetic_model

#: Decode batches at which imbalance is compared.
BATCHES = (16, 64, 256)
#: Layers ahead at which predictability is compared.
DISTANCES = (1, 4)
#: Consecutive tokens whose load the layer below is to tell.
LOAD_TOKENS = 512
#: Draws of router weights over which synthetic measures are averaged.
_DRAWS = 3
#: Parameters that are searched. All but ``latent`` are positive: they are searched on a scale on which a step is a
#: factor, of the value or, for correlations, of what they lack to 1.
_SPREADS = ("popularity", "category", "request", "token", "layer")
_CORRELATIONS = ("persistence", "neighbour")


@dataclass(frozen=True)
class Calibration:
    """Fitted parameters, and rows of (measure, real on held-out requests, synthetic)."""

    params: SyntheticParams
    report: tuple[tuple[str, float, float], ...]


def measures(trace: TokenTrace, requests: IntArray, *, gpus: int, seed: int = 0) -> dict[str, float]:
    """Popularity, imbalance, persistence and predictability of some of a trace's requests."""
    first, length = trace.requests.first_row[requests], trace.rows_N[requests]
    rows = np.concatenate([np.arange(a, a + n) for a, n in zip(first, length, strict=True)])
    return measure(trace.load_topk()[rows], length, trace.spec, gpus=gpus, seed=seed)


def measure(
    topk_TLK: NDArray[np.uint16], length_N: IntArray, spec: MoESpec, *, gpus: int, seed: int = 0
) -> dict[str, float]:
    """The same of ids ``[T, L, K]`` of requests of those lengths, one after the other."""
    begin, count = np.cumsum(length_N) - length_N, len(length_N)
    loads = st.request_loads(topk_TLK, begin, length_N, spec.E)
    rng = np.random.default_rng(seed)
    popularity = np.sort(st.shares(loads.sum(axis=0)), axis=1)
    made = {
        "busiest expert over even share": float(popularity[:, -1].mean() * spec.E),
        "share of the busiest quarter": float(popularity[:, -max(1, spec.E // 4) :].sum(axis=1).mean()),
        "imbalance of one request": float(st.imbalance_L(loads, gpus).mean()),
        "imbalance of 16 requests": float(st.imbalance_L(st.pooled(loads, 16, 60, rng), gpus).mean()),
    }
    for batch in BATCHES:
        chosen = rng.integers(0, count, (60, batch))
        tokens = begin[chosen] + np.floor(rng.random(chosen.shape) * length_N[chosen]).astype(np.int64)
        window = st.window_loads(topk_TLK, tokens, spec.E)
        made[f"imbalance of a decode step of {batch}"] = float(st.imbalance_L(window, gpus).mean())
    owner = np.repeat(np.arange(count), length_N)
    for lag in (1, 16):
        pairs = np.flatnonzero(owner[:-lag] == owner[lag:])
        if len(pairs):
            pairs = rng.permutation(pairs)[:20_000]
            made[f"overlap of tokens {lag} apart"] = float(st.overlap_L(topk_TLK[pairs], topk_TLK[pairs + lag]).mean())
    sample = topk_TLK[rng.permutation(len(topk_TLK))[:20_000]]
    for distance in DISTANCES:
        if distance < spec.L:
            name = "next layer known better by" if distance == 1 else f"layer {distance} ahead known better by"
            made[name] = float(np.nanmean(st.next_layer_gain_L(sample, spec.E, distance)))
    if spec.L > 1:
        error = st.next_load_error(topk_TLK, spec.E, LOAD_TOKENS)
        made[f"error of the next layer's load of {LOAD_TOKENS} tokens, over history's"] = error
    return made


def calibrate(
    trace: TokenTrace, *, gpus: int = 8, sample_requests: int = 50, trials: int = 60, seed: int = 0
) -> Calibration:
    """Fit by random search, from the default parameters, on 70 % of the requests; report on the other 30 %.

    Raises:
        UserError: the trace has fewer than 20 requests.
    """
    if trace.num_requests < 20:
        raise UserError(f"calibration needs at least 20 requests, {trace.path} has {trace.num_requests}")
    spec, gpus = trace.spec, min(gpus, trace.spec.E)
    rng = np.random.default_rng(seed)
    order = rng.permutation(trace.num_requests)
    cut = int(0.7 * len(order))
    known, unseen = np.sort(order[:cut]), np.sort(order[cut:])
    real, held_out = (measures(trace, part, gpus=gpus) for part in (known, unseen))
    lengths = trace.rows_N[rng.permutation(known)[:sample_requests]]
    mean = float(trace.rows_N.mean())
    categories = max(1, min(len({name for name in trace.requests.category if name}), 64))
    best = SyntheticParams(categories=categories, prompt_tokens=max(1.0, mean / 2), output_tokens=mean / 2 + 1)
    least = _error(real, generated(spec, best, lengths, gpus=gpus, seed=seed))
    step = 0.6
    for _ in range(trials):
        tried = _stepped(best, step, rng)
        error = _error(real, generated(spec, tried, lengths, gpus=gpus, seed=seed))
        step = min(1.2 * step, 0.8) if error < least else max(0.97 * step, 0.1)
        if error < least:
            best, least = tried, error
    # router weights and requests that the search did not see
    made = generated(spec, best, trace.rows_N[unseen], gpus=gpus, seed=seed + _DRAWS)
    return Calibration(best, tuple((name, held_out[name], made.get(name, float("nan"))) for name in held_out))


def generated(spec: MoESpec, params: SyntheticParams, length_N: IntArray, *, gpus: int, seed: int) -> dict[str, float]:
    """Measures of synthetic requests of those lengths, averaged over models drawn from ``seed`` on."""
    made = []
    for draw in range(seed, seed + _DRAWS):
        model = synthetic_model(spec, params, seed=draw)
        randoms = [np.random.default_rng([draw, 2, index]) for index in range(len(length_N))]
        parts = [model.request(int(rows), random)[1] for rows, random in zip(length_N, randoms, strict=True)]
        made.append(measure(np.concatenate(parts), length_N, spec, gpus=gpus))
    return {name: float(np.mean([one[name] for one in made])) for name in made[0]}


def _stepped(params: SyntheticParams, step: float, rng: np.random.Generator) -> SyntheticParams:
    """One to three of the parameters changed at random."""
    names = (*_SPREADS, *_CORRELATIONS, "latent")
    changed: dict[str, Any] = {}
    for name in rng.choice(names, int(rng.integers(1, 4)), replace=False).tolist():
        value, factor = getattr(params, name), float(np.exp(step * rng.standard_normal()))
        if name in _SPREADS:
            changed[name] = float(np.clip(value * factor, 1e-3, 50.0))
        elif name in _CORRELATIONS:
            changed[name] = float(np.clip(1.0 - (1.0 - value) * factor, 0.0, 0.999))
        else:
            changed[name] = int(np.clip(value + rng.choice((-1, 1)), 1, 64))
    return dataclasses.replace(params, **changed)


def _error(real: dict[str, float], other: dict[str, float]) -> float:
    """Sum of squared relative differences; the excess over 1 for ratios that cannot be below it."""
    total = 0.0
    for name, value in real.items():
        base = 1.0 if name.startswith(("imbalance", "busiest")) else 0.0
        total += ((other.get(name, 0.0) - value) / max(value - base, 0.05)) ** 2
    return total
