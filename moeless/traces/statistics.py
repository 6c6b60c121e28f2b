"""Measures of routing: how skewed, how imbalanced on GPUs, how steady, how correlated.

Axes: N windows, L layers, E experts, G GPUs, T tokens (rows), K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import FloatArray, IntArray
from moeless.errors import UserError
from moeless.traces.compose import range_loads, span_loads
from moeless.traces.store import TokenTrace


def contiguous_gpu_loads(load_NLE: NDArray[Any], gpus: int) -> FloatArray:
    """Load per GPU ``[N, L, G]`` of contiguous blocks of experts; the first ``E mod G`` GPUs hold one more.

    Raises:
        UserError: there are more GPUs than experts.
    """
    experts = load_NLE.shape[-1]
    if gpus > experts:
        raise UserError(f"{experts} experts cannot be spread over {gpus} GPUs without copies; choose fewer")
    base, more = divmod(experts, gpus)
    sizes = base + (np.arange(gpus) < more)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    return np.add.reduceat(np.asarray(load_NLE, np.float64), starts, axis=-1)


def imbalance_L(load_NLE: NDArray[Any], gpus: int) -> FloatArray:
    """Mean over windows of max / mean over GPUs, per layer ``[L]``; windows without load in a layer are left out."""
    gpu = contiguous_gpu_loads(load_NLE, gpus)
    mean = gpu.mean(axis=-1)
    ratio = np.divide(gpu.max(axis=-1), mean, out=np.full(mean.shape, np.nan), where=mean > 0)
    return np.asarray(np.nanmean(ratio, axis=0), np.float64)


def request_loads(topk_TLK: NDArray[np.uint16], first_N: IntArray, length_N: IntArray, experts: int) -> IntArray:
    """Load of each request ``[N, L, E]``."""
    count = len(first_N)
    load = range_loads(topk_TLK, first_N, first_N + length_N, np.arange(count), experts, count)
    return np.ascontiguousarray(load.transpose(1, 0, 2))


def pooled(load_NLE: IntArray, group: int, windows: int, rng: np.random.Generator) -> IntArray:
    """Sums over ``group`` requests drawn without replacement, ``windows`` times."""
    count = len(load_NLE)
    size = min(group, count)
    return np.stack([load_NLE[rng.choice(count, size, replace=False)].sum(axis=0) for _ in range(windows)])


def decode_loads(
    trace: TokenTrace, topk_TLK: NDArray[np.uint16], batch: int, windows: int, rng: np.random.Generator
) -> IntArray:
    """Decode iterations ``[windows, L, E]``: one random decode token from each of ``batch`` requests.

    Requests are drawn without replacement where there are enough, otherwise with.
    """
    first = trace.requests.first_row + trace.requests.prompt_tokens
    length = trace.rows_N - trace.requests.prompt_tokens
    usable = np.flatnonzero(length > 0)
    if not len(usable):
        return np.empty((0, *topk_TLK.shape[1:2], trace.spec.E), np.int64)
    rows = np.empty((windows, batch), np.int64)
    for window in range(windows):
        chosen = rng.choice(usable, batch, replace=batch > len(usable))
        rows[window] = first[chosen] + np.floor(rng.random(batch) * length[chosen]).astype(np.int64)
    return window_loads(topk_TLK, rows, trace.spec.E)


def prefill_loads(
    trace: TokenTrace, topk_TLK: NDArray[np.uint16], tokens: int, windows: int, rng: np.random.Generator
) -> IntArray:
    """Prefill iterations: rows of whole requests in random order, one after the other, cut at ``tokens``.

    Prompt rows where the trace has them; a trace of generated tokens stands in with those.
    """
    first, length = trace.requests.first_row, trace.requests.prompt_tokens
    if not length.any():
        length = trace.rows_N
    usable = np.flatnonzero(length > 0)
    if int(length.sum()) < tokens:
        return np.empty((0, trace.spec.L, trace.spec.E), np.int64)
    loads = []
    for _ in range(windows):
        order = rng.permutation(usable)
        stop = np.minimum(np.cumsum(length[order]), tokens)
        taken = np.diff(stop, prepend=0)
        keep = taken > 0
        zero = np.zeros(int(keep.sum()), np.int64)
        start = first[order][keep]
        loads.append(range_loads(topk_TLK, start, start + taken[keep], zero, trace.spec.E, 1)[:, 0])
    return np.stack(loads)


def window_loads(topk_TLK: NDArray[np.uint16], rows_NT: IntArray, experts: int) -> IntArray:
    """Load ``[N, L, E]`` of windows of rows ``[N, T]``."""
    windows, batch = rows_NT.shape
    load = span_loads(topk_TLK, rows_NT.ravel(), np.repeat(np.arange(windows), batch), experts, windows)
    return np.ascontiguousarray(load.transpose(1, 0, 2))


def shares(load: NDArray[Any]) -> FloatArray:
    """Loads as shares of the last axis; where there is no load, even ones."""
    total = load.sum(axis=-1, keepdims=True)
    even = np.full(load.shape, 1.0 / load.shape[-1])
    return np.asarray(np.divide(load, total, out=even, where=total > 0), np.float64)


def distance_L(load_LE: NDArray[Any], other_LE: NDArray[Any]) -> FloatArray:
    """Total-variation distance of two layers' expert shares, ``[L]``: the part of tokens that would have to move."""
    return np.asarray(0.5 * np.abs(shares(load_LE) - shares(other_LE)).sum(axis=-1), np.float64)


def groups(names: Sequence[str], most: int = 12) -> dict[str, IntArray]:
    """Indices of requests by category, the largest ``most`` ones; unnamed requests are left out."""
    found: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if name:
            found.setdefault(name, []).append(index)
    largest = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))[:most]
    return {name: np.array(indices, np.int64) for name, indices in largest}


def coactivation_EE(topk_TK: NDArray[np.uint16], experts: int) -> FloatArray:
    """How often two experts of one layer serve the same token, over what independence would give; diagonal NaN.

    With shares ``p_e = P(token uses e)``, entry (a, b) is ``P(a and b) / (p_a * p_b)``.
    """
    used = np.zeros((len(topk_TK), experts), np.float32)
    np.put_along_axis(used, topk_TK.astype(np.int64), 1.0, axis=1)
    together = (used.T @ used).astype(np.float64) / len(topk_TK)
    alone = np.diag(together).copy()
    expected = np.outer(alone, alone)
    ratio = np.divide(together, expected, out=np.full(expected.shape, np.nan), where=expected > 0)
    np.fill_diagonal(ratio, np.nan)
    return np.asarray(ratio, np.float64)


def overlap_L(topk_TLK: NDArray[np.uint16], other_TLK: NDArray[np.uint16]) -> FloatArray:
    """Mean part of a token's experts that the paired token uses too, per layer ``[L]``."""
    equal = (topk_TLK[..., :, None] == other_TLK[..., None, :]).any(axis=-1)
    return np.asarray(equal.mean(axis=(0, 2)), np.float64)


def persistence_L(trace: TokenTrace, topk_TLK: NDArray[np.uint16], lag: int, limit: int = 20_000) -> FloatArray:
    """Overlap of tokens ``lag`` apart in the same request, per layer; NaN where no request is that long."""
    rows = np.arange(min(trace.num_rows, limit) - lag)
    owner = np.repeat(np.arange(trace.num_requests), trace.rows_N)
    rows = rows[owner[rows] == owner[rows + lag]] if len(rows) else rows
    if not len(rows):
        return np.full(trace.spec.L, np.nan)
    return overlap_L(topk_TLK[rows], topk_TLK[rows + lag])


def next_layer_gain_L(topk_TLK: NDArray[np.uint16], experts: int, distance: int = 1) -> FloatArray:
    """Predictability of a later layer's ids from this layer's, per source layer ``[L-distance]``.

    Half of the tokens fit P(expert at l+distance | first expert at l); on the others, the part of top-K assignments
    in the K most likely experts given the token's first expert, minus that of the K most popular ones.
    """
    half = len(topk_TLK) // 2
    fit, test = topk_TLK[:half], topk_TLK[half:]
    layers, top = topk_TLK.shape[1], topk_TLK.shape[2]
    gain = np.full(max(layers - distance, 0), np.nan)
    if half == 0:
        return gain
    for layer in range(layers - distance):
        pair = np.zeros((experts, experts), np.int64)
        for k in range(top):
            np.add.at(pair, (fit[:, layer, 0], fit[:, layer + distance, k]), 1)
        given = np.argsort(-pair, axis=1, kind="stable")[:, :top]
        popular = np.argsort(-pair.sum(axis=0), kind="stable")[:top]
        target = test[:, layer + distance]
        known = (target[:, :, None] == given[test[:, layer, 0]][:, None, :]).any(axis=-1).mean()
        blind = np.isin(target, popular).mean()
        gain[layer] = known - blind
    return gain


def next_load_error(topk_TLK: NDArray[np.uint16], experts: int, tokens: int) -> float:
    """Error of the next layer's load told from this layer's, over that of the mean load; NaN where tokens are too few.

    The first half of the rows fits P(expert at l+1 | expert at l), each pair of a token's experts counting alike; loads
    are those of consecutive ``tokens`` rows of the second half, errors sums of absolute differences over layers.
    """
    half, windows = len(topk_TLK) // 2, (len(topk_TLK) - len(topk_TLK) // 2) // tokens
    told = known = 0.0
    if not windows:
        return float("nan")
    test = topk_TLK[half : half + windows * tokens].astype(np.int64)
    window = np.repeat(np.arange(windows), tokens)
    fit_L = topk_TLK[:half].astype(np.int64).transpose(1, 0, 2)
    load_LNE = np.stack([_window_loads(test[:, layer], window, experts) for layer in range(test.shape[1])])
    for layer in range(len(fit_L) - 1):
        pairs = fit_L[layer][:, :, None] * experts + fit_L[layer + 1][:, None, :]
        pair = np.bincount(pairs.ravel(), minlength=experts**2).reshape(experts, experts)
        mean = pair.sum(axis=0) / max(pair.sum(), 1)
        row = pair.sum(axis=1, keepdims=True)
        given = np.where(row > 0, pair / np.maximum(row, 1), mean)
        true = load_LNE[layer + 1]
        told += float(np.abs(load_LNE[layer] @ given - true).sum())
        known += float(np.abs(mean * true.sum(axis=1, keepdims=True) - true).sum())
    return told / known if known else float("nan")


def _window_loads(expert_TK: IntArray, window_T: IntArray, experts: int) -> IntArray:
    """Load ``[N, E]`` of one layer in windows that rows belong to."""
    index = window_T[:, None] * experts + expert_TK
    return np.bincount(index.ravel(), minlength=(int(window_T[-1]) + 1) * experts).reshape(-1, experts)
