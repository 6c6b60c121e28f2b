"""Made-up routing with the statistics of real routing, for models whose weights are out of reach.

A router scores a token by the product of its weights with the token's hidden state, and a hidden state changes little
from one layer to the next. So here: a token has a state of few dimensions, the sum of its category's, its request's and
its own; the own part persists in part from token to token; all parts change a little from layer to layer. A layer's
scores are ``popularity + W_l state + deviation + noise``: weights ``W_l`` drawn once per model, a deviation of the
request in that layer alone, and Gumbel noise; the K largest are the token's experts. Since the state persists, the
experts of one layer tell about those of the next, as in real models. Every spread is a parameter, so that a generator
can be calibrated from a real trace (:mod:`moeless.traces.calibration`) or from a popularity histogram
(:func:`popularity_from_histogram`). What comes out is always labelled synthetic.

Axes: C categories, L layers, E experts, D dimensions of the state, T tokens, K experts per token.
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

#: Tokens whose noise is drawn at once.
_BLOCK = 256


@dataclass(frozen=True)
class SyntheticParams:
    """Standard deviations of scores, in units of the Gumbel noise's scale.

    The defaults are those of gpt-oss-20b: chosen by hand after searches by ``moeless.traces.calibration.calibrate``.

    Attributes:
        popularity: of the layer's expert logits, where they are not given.
        category, request, token: of what the category's, the request's and the token's own state add to a score.
        layer: of what a request adds in one layer alone, which the layers around it do not tell.
        persistence: correlation of a token's own state with that of the token before, in [0, 1).
        neighbour: correlation of a state with itself one layer up, in [0, 1).
        latent: dimensions of the state; fewer tie experts of different layers closer together.
        categories: number of categories.
        prompt_tokens, output_tokens: means of the geometric lengths.
    """

    popularity: float = 0.7
    category: float = 0.4
    request: float = 2.8
    token: float = 4.5
    layer: float = 1.0
    persistence: float = 0.5
    neighbour: float = 0.994
    latent: int = 4
    categories: int = 8
    prompt_tokens: float = 256.0
    output_tokens: float = 128.0

    def __post_init__(self) -> None:
        for name in ("popularity", "category", "request", "token", "layer"):
            if not 0 <= getattr(self, name) < 100:
                raise UserError(f"synthetic routing: the spread {name} must lie between 0 and 100")
        for name in ("persistence", "neighbour"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"synthetic routing: {name} must lie between 0 and 1, 1 excluded")
        if not 1 <= self.latent <= 256:
            raise UserError(f"synthetic routing: the state has 1 to 256 dimensions, got {self.latent}")
        if self.categories < 1 or self.prompt_tokens < 1 or self.output_tokens < 1:
            raise UserError("synthetic routing needs a category and lengths of at least one token")


@njit(
    "void(float64[:,::1], float64[:,:,::1], float64[:,::1], float64[:,::1], boolean, float64[:,:,::1],"
    "float64[:,:,::1], float64, float64, float64, uint16[:,:,::1])",
    cache=True,
    nogil=True,
)
def _route(
    logit_LE, weight_LED, slow_LD, own_LD, fresh_start, fresh_TLD, noise_TLE, spread, persistence, neighbour, topk_TLK
):  # type: ignore[no-untyped-def]
    """Fill ``topk_TLK``; ``own_LD`` carries the last token's own state from block to block."""
    tokens, layers, dimensions = fresh_TLD.shape
    experts, top = logit_LE.shape[1], topk_TLK.shape[2]
    renew, change = np.sqrt(1.0 - persistence * persistence), np.sqrt(1.0 - neighbour * neighbour)
    new, state, score = np.zeros(dimensions), np.zeros(dimensions), np.zeros(experts)
    for token in range(tokens):
        first = fresh_start and token == 0
        for layer in range(layers):
            for d in range(dimensions):
                value = fresh_TLD[token, layer, d]
                new[d] = value if layer == 0 else neighbour * new[d] + change * value
                own_LD[layer, d] = new[d] if first else persistence * own_LD[layer, d] + renew * new[d]
                state[d] = slow_LD[layer, d] + spread * own_LD[layer, d]
            for expert in range(experts):
                value = logit_LE[layer, expert] + noise_TLE[token, layer, expert]
                for d in range(dimensions):
                    value += weight_LED[layer, expert, d] * state[d]
                score[expert] = value
            for k in range(top):
                best = 0
                for expert in range(1, experts):
                    if score[expert] > score[best]:
                        best = expert
                topk_TLK[token, layer, k] = best
                score[best] = -np.inf


def state_LD(layers: int, params: SyntheticParams, rng: np.random.Generator) -> FloatArray:
    """A standard normal state whose neighbouring layers are correlated, ``[L, D]``."""
    made = rng.standard_normal((layers, params.latent))
    change = np.sqrt(1.0 - params.neighbour**2)
    for layer in range(1, layers):
        made[layer] = params.neighbour * made[layer - 1] + change * made[layer]
    return made


@dataclass(frozen=True)
class SyntheticModel:
    """What all requests share.

    Attributes:
        weight_LED: router weights; rows have a length of 1 on average.
        logit_CLE: popularity of each category's experts. state_CLD: state of each category.
        names: of the categories.
    """

    params: SyntheticParams
    top_k: int
    weight_LED: FloatArray
    logit_CLE: FloatArray
    state_CLD: FloatArray
    names: tuple[str, ...]

    def request(
        self, tokens: int, rng: np.random.Generator, category: int | None = None
    ) -> tuple[int, NDArray[np.uint16]]:
        """Category and expert ids ``[T, L, K]`` of one request's consecutive tokens."""
        params, (layers, experts, dimensions) = self.params, self.weight_LED.shape
        chosen = int(rng.integers(len(self.names))) if category is None else category
        slow = params.category * self.state_CLD[chosen] + params.request * state_LD(layers, params, rng)
        logit = self.logit_CLE[chosen] + rng.normal(0.0, params.layer, (layers, experts))
        topk, own = np.empty((tokens, layers, self.top_k), np.uint16), np.zeros((layers, dimensions))
        for start in range(0, tokens, _BLOCK):
            part = topk[start : start + _BLOCK]
            fresh = rng.standard_normal((len(part), layers, dimensions))
            noise = rng.gumbel(size=(len(part), layers, experts))
            _route(
                logit, self.weight_LED, slow, own, start == 0, fresh, noise,
                params.token, params.persistence, params.neighbour, part,
            )  # fmt: skip
        return chosen, topk


def synthetic_model(
    spec: MoESpec,
    params: SyntheticParams,
    *,
    share_CLE: Mapping[str, FloatArray] | None = None,
    seed: int = 0,
) -> SyntheticModel:
    """Draw a model's router weights and its categories.

    Args:
        share_CLE: popularity ``[L, E]`` of each category by name; without it all categories share one that is drawn.
    """
    rng = np.random.default_rng([seed, 1])
    weight = rng.normal(0.0, 1.0 / np.sqrt(params.latent), (spec.L, spec.E, params.latent))
    if share_CLE is None:
        names = tuple(f"category-{index}" for index in range(params.categories))
        logit = rng.normal(0.0, params.popularity, (spec.L, spec.E))
        state = np.stack([state_LD(spec.L, params, rng) for _ in names])
        return SyntheticModel(params, spec.K, weight, np.stack([logit] * len(names)), state, names)
    # what is given includes what the category's state would add
    logits = [fit_logits(np.asarray(share), spec.K, params, weight, rng) for share in share_CLE.values()]
    none = np.zeros((len(logits), spec.L, params.latent))
    return SyntheticModel(params, spec.K, weight, np.stack(logits), none, tuple(share_CLE))


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


def fit_logits(
    share_LE: FloatArray, top_k: int, params: SyntheticParams, weight_LED: FloatArray, rng: np.random.Generator
) -> FloatArray:
    """Logits ``[L, E]`` under which top-K choice yields the given expert shares (sum 1 a layer).

    Fixed-point iteration on simulated tokens: what requests and tokens add to the scores makes the observed shares
    flatter than softmax would, so that the logarithm alone misses.
    """
    layers, experts = share_LE.shape
    target = np.maximum(share_LE, 0.02 / experts)
    target = target / target.sum(axis=1, keepdims=True)
    logits = np.log(target * experts)
    state = float(np.hypot(params.request, params.token)) * rng.standard_normal((2000, layers, params.latent))
    noise = rng.gumbel(size=(2000, layers, experts)) + np.einsum("tld,led->tle", state, weight_LED)
    noise += rng.normal(0.0, params.layer, noise.shape)
    offset = experts * np.arange(layers)[:, None]
    for _ in range(20):
        chosen = np.argpartition(-(logits + noise), top_k - 1, axis=2)[..., :top_k]
        used = np.bincount((chosen + offset).ravel(), minlength=layers * experts).reshape(layers, experts)
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
    model = synthetic_model(spec, params, share_CLE=share_CLE, seed=seed)
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
    with folder_atomic(out) as folder:
        writer = TokenTraceWriter(folder, info)
        for request in range(requests):
            mine = np.random.default_rng([seed, 2, request])
            prompt, output = (
                int(np.clip(mine.geometric(1.0 / mean), 1, 8 * mean))
                for mean in (params.prompt_tokens, params.output_tokens)
            )
            # the last generated token is never fed back
            category, topk = model.request(prompt + output - 1, mine)
            writer.append([_rows(request, topk, prompt, output, model.names[category])])
        return writer.close()


def _rows(request: int, topk: NDArray[np.uint16], prompt: int, output: int, category: str) -> RequestRows:
    return RequestRows(request=request, topk_TLK=topk, prompt_tokens=prompt, output_tokens=output, category=category)
