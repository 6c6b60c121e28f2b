"""Made-up routing with the statistics of real routing, for models whose weights are out of reach.

A token's score for an expert is ``popularity + category + request + u + noise``: logits of the layer's popularity,
deviations of its category and request, a deviation ``u`` that persists from token to token and is shared in part
with the layer above, and Gumbel noise; the K largest scores are its experts. Every spread is a parameter, so that a
generator can be calibrated from a real trace (:func:`calibrate`) or from a popularity histogram
(:func:`popularity_from_histogram`). What comes out is always labelled synthetic.

Axes: C categories, L layers, E experts, T tokens, K experts per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import FloatArray
from moeless.errors import UserError
from moeless.files import folder_atomic, read_json
from moeless.jit import njit
from moeless.spec import MoESpec
from moeless.traces.info import TraceInfo
from moeless.traces.writers import RequestRows, TokenTraceWriter


@dataclass(frozen=True)
class SyntheticParams:
    """Standard deviations in units of the Gumbel noise's scale.

    The defaults are of the order of real models'; ``moeless.traces.calibration.calibrate`` fits them to a trace.

    Attributes:
        popularity: of the layer's expert logits, where they are not given.
        category, request, token: of the deviations of a category, a request, and a token.
        persistence: part of a token's deviation that stays to the next token, in [0, 1).
        neighbour: part of a layer's token deviation that comes from the layer below, in [0, 1).
        categories: number of categories.
        prompt_tokens, output_tokens: means of the geometric lengths.
    """

    popularity: float = 0.55
    category: float = 0.35
    request: float = 0.45
    token: float = 1.6
    persistence: float = 0.8
    neighbour: float = 0.3
    categories: int = 8
    prompt_tokens: float = 256.0
    output_tokens: float = 128.0

    def __post_init__(self) -> None:
        for name in ("popularity", "category", "request", "token"):
            if not 0 <= getattr(self, name) < 100:
                raise UserError(f"synthetic routing: the spread {name} must lie between 0 and 100")
        for name in ("persistence", "neighbour"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"synthetic routing: {name} must lie between 0 and 1, 1 excluded")
        if self.categories < 1 or self.prompt_tokens < 1 or self.output_tokens < 1:
            raise UserError("synthetic routing needs a category and lengths of at least one token")


@njit(
    "void(float64[:,::1], float64[:,:,::1], float64[:,:,::1], float64, float64, float64, uint16[:,:,::1])",
    cache=True,
    nogil=True,
)
def _route(base_LE, fresh_TLE, noise_TLE, spread, persistence, neighbour, topk_TLK):  # type: ignore[no-untyped-def]
    tokens, layers, experts = fresh_TLE.shape
    top = topk_TLK.shape[2]
    keep, renew = persistence, np.sqrt(1.0 - persistence * persistence)
    below, own = neighbour, np.sqrt(1.0 - neighbour * neighbour)
    state = np.zeros((layers, experts))
    seen = np.zeros(experts)
    score = np.zeros(experts)
    for token in range(tokens):
        for layer in range(layers):
            for expert in range(experts):
                value = fresh_TLE[token, layer, expert]
                if token > 0:
                    value = keep * state[layer, expert] + renew * value
                state[layer, expert] = value
            # the deviation that scores is shared in part with the layer below, and through it with all below
            for expert in range(experts):
                value = state[layer, expert]
                seen[expert] = value if layer == 0 else below * seen[expert] + own * value
                score[expert] = base_LE[layer, expert] + spread * seen[expert] + noise_TLE[token, layer, expert]
            for k in range(top):
                best = 0
                for expert in range(1, experts):
                    if score[expert] > score[best]:
                        best = expert
                topk_TLK[token, layer, k] = best
                score[best] = -np.inf


def route(
    tokens: int, base_LE: FloatArray, top_k: int, params: SyntheticParams, rng: np.random.Generator
) -> NDArray[np.uint16]:
    """Expert ids of one request's consecutive tokens, u16 ``[T, L, K]``."""
    shape = (tokens, *base_LE.shape)
    topk = np.empty((tokens, base_LE.shape[0], top_k), np.uint16)
    fresh, noise = rng.standard_normal(shape), rng.gumbel(size=shape)
    base = np.ascontiguousarray(base_LE, np.float64)
    _route(base, fresh, noise, params.token, params.persistence, params.neighbour, topk)
    return topk


def popularity_from_histogram(path: Path, spec: MoESpec) -> tuple[dict[str, FloatArray], str]:
    """Shares ``[L, E]`` of each named data set in a histogram file, ``{name: {expert_popularity: [L][E]}}``.

    Raises:
        UserError: the file breaks that layout or does not fit the model.
    """
    data = read_json(path)
    if not isinstance(data, Mapping) or not data:
        raise UserError(f"{path} must hold an object of data sets, each with expert_popularity [layers][experts]")
    found: dict[str, FloatArray] = {}
    for name, entry in data.items():
        try:
            counts = np.asarray(entry["expert_popularity"], np.float64)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: {name} holds no expert_popularity of numbers") from None
        if counts.shape != (spec.L, spec.E):
            raise UserError(f"{path}: {name} has popularity of {counts.shape}, {spec.name} has {(spec.L, spec.E)}")
        if not np.isfinite(counts).all() or (counts < 0).any() or (counts.sum(axis=1) <= 0).any():
            raise UserError(f"{path}: {name} holds a popularity that is negative, not finite, or all zero in a layer")
        found[str(name)] = counts / counts.sum(axis=1, keepdims=True)
    return found, path.name


def fit_logits(share_LE: FloatArray, top_k: int, params: SyntheticParams, rng: np.random.Generator) -> FloatArray:
    """Logits ``[L, E]`` under which top-K choice yields the given expert shares (sum 1 a layer).

    Fixed-point iteration on simulated tokens: the deviations around the logits make the observed shares flatter
    than softmax would, so that the logarithm alone misses.
    """
    layers, experts = share_LE.shape
    target = np.maximum(share_LE, 0.02 / experts)
    target = target / target.sum(axis=1, keepdims=True)
    logits = np.log(target * experts)
    spread = float(np.sqrt(params.category**2 + params.request**2 + params.token**2))
    noise = rng.gumbel(size=(2000, layers, experts)) + rng.normal(0.0, spread, (2000, layers, experts))
    for _ in range(15):
        chosen = np.argpartition(-(logits + noise), top_k - 1, axis=2)[..., :top_k]
        used = np.stack([np.bincount(chosen[:, layer].ravel(), minlength=experts) for layer in range(layers)])
        logits += np.clip(np.log(target / np.maximum(used / used.sum(axis=1, keepdims=True), 0.005 / experts)), -1, 1)
        logits -= logits.mean(axis=1, keepdims=True)
    return np.asarray(logits, np.float64)


def write_synthetic(
    out: Path,
    spec: MoESpec,
    *,
    requests: int,
    params: SyntheticParams | None = None,
    share_CLE: Mapping[str, FloatArray] | None = None,
    seed: int = 0,
    calibrated_from: str = "",
) -> TraceInfo:
    """Write a synthetic token trace.

    Args:
        share_CLE: popularity ``[L, E]`` of each category by name; without it both are drawn by ``seed``.
        calibrated_from: what the parameters or shares come from, kept in the trace.

    Raises:
        UserError: a parameter is out of range, or ``out`` cannot be written.
    """
    params = params or SyntheticParams()
    if requests < 1:
        raise UserError(f"the number of requests must be at least 1, got {requests}")
    if share_CLE is not None and not share_CLE:
        raise UserError("no category's popularity is given")
    shape = (spec.L, spec.E)
    rng = np.random.default_rng([seed, 1])
    if share_CLE is None:
        common = rng.normal(0.0, params.popularity, shape)
        bases = {f"category-{c}": common + rng.normal(0.0, params.category, shape) for c in range(params.categories)}
    else:
        bases = {name: fit_logits(np.asarray(share), spec.K, params, rng) for name, share in share_CLE.items()}
    info = TraceInfo(
        kind="tokens",
        spec=spec,
        source={"generator": "moeless.traces.synthetic", "calibrated_from": calibrated_from or "defaults"},
        seed=seed,
        synthetic=True,
        has_weights=False,
        settings={"requests": requests, **dataclasses.asdict(params)},
        notes=("synthetic: generated from statistics, not recorded from a model",),
    )
    names = list(bases)
    with folder_atomic(out) as folder:
        writer = TokenTraceWriter(folder, info)
        for request in range(requests):
            mine = np.random.default_rng([seed, 2, request])
            name = names[int(mine.integers(len(names)))]
            base = bases[name] + mine.normal(0.0, params.request, shape)
            prompt, output = (
                int(np.clip(mine.geometric(1.0 / mean), 1, 8 * mean))
                for mean in (params.prompt_tokens, params.output_tokens)
            )
            # the last generated token is never fed back
            topk = route(prompt + output - 1, base, spec.K, params, mine)
            writer.append([_rows(request, topk, prompt, output, name)])
        return writer.close()


def _rows(request: int, topk: NDArray[np.uint16], prompt: int, output: int, category: str) -> RequestRows:
    return RequestRows(request=request, topk_TLK=topk, prompt_tokens=prompt, output_tokens=output, category=category)
