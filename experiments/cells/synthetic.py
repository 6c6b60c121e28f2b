"""Artefacts: made-up routing for models whose weights are out of reach, always labelled synthetic.

A token goes to the K experts with the largest ``p + c + r + u + Gumbel noise``: p the layer's popularity, c the
deviation of its category, r that of its request, u a deviation that persists from token to token. All are normal;
their spreads come from a coarse search against real routing of gpt-oss-20b (32 experts, top-4, 8 GPUs, contiguous
experts), where they give an imbalance of 1.82 over all tokens of one request (real: 1.84), 1.43 over 16 requests
pooled (1.49) and 1.65 in a decode step of 16 (1.64); neighbouring layers are independent, which real ones are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moeless.contracts import FloatArray
from moeless.spec import preset
from moeless.traces import RequestRows, TokenTraceWriter, TraceInfo

#: Spreads of popularity, category, request and persistent token deviation, in units of the Gumbel noise's scale.
SPREADS = {"popularity": 0.6, "category": 0.4, "request": 0.8, "token": 0.8}
#: How much of the token deviation stays from one token to the next.
PERSISTENCE = 0.8
CATEGORIES = 6


def route(
    tokens: int, base_LE: FloatArray, top_k: int, rng: np.random.Generator, token_spread: float
) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Expert ids of a request's consecutive tokens, ``[T, L, K]``."""
    layers, experts = base_LE.shape
    topk_TLK = np.empty((tokens, layers, top_k), np.uint16)
    state = rng.normal(0.0, token_spread, (layers, experts))
    fresh = token_spread * np.sqrt(1.0 - PERSISTENCE**2)
    for token in range(tokens):
        state = PERSISTENCE * state + rng.normal(0.0, fresh, (layers, experts))
        score_LE = base_LE + state + rng.gumbel(size=(layers, experts))
        topk_TLK[token] = np.argpartition(-score_LE, top_k - 1, axis=1)[:, :top_k]
    return topk_TLK


def trace(params: dict[str, Any], needs: list[Any], folder: Path) -> None:
    """Write a token trace.

    Params: ``model`` (a preset), ``requests``, ``prompt_tokens`` and ``output_tokens`` (means of geometric lengths),
    ``dataset`` (keys popularity, so that two data sets differ), ``seed``.
    """
    spec = preset(params["model"])
    key = [params["seed"], *params["dataset"].encode(), *params["model"].encode()]
    rng = np.random.default_rng(key)
    shape = (spec.L, spec.E)
    popularity = rng.normal(0.0, SPREADS["popularity"], shape)
    category_CLE = rng.normal(0.0, SPREADS["category"], (CATEGORIES, *shape))
    info = TraceInfo(
        kind="tokens",
        spec=spec,
        source={"generator": "moeless.experiments.cells.synthetic", "spreads": SPREADS, "persistence": PERSISTENCE},
        prompt_source={"dataset": f"stand-in for {params['dataset']}"},
        seed=params["seed"],
        synthetic=True,
        has_weights=False,
    )
    writer = TokenTraceWriter(folder, info)
    for request in range(params["requests"]):
        mine = np.random.default_rng([*key, request])
        category = int(mine.integers(CATEGORIES))
        base_LE = popularity + category_CLE[category] + mine.normal(0.0, SPREADS["request"], shape)
        prompt = int(np.clip(mine.geometric(1.0 / params["prompt_tokens"]), 8, 4 * params["prompt_tokens"]))
        output = int(np.clip(mine.geometric(1.0 / params["output_tokens"]), 2, 3 * params["output_tokens"]))
        # the last generated token is never fed back
        topk_TLK = route(prompt + output - 1, base_LE, spec.K, mine, SPREADS["token"])
        writer.append([RequestRows(request, topk_TLK, prompt, output, category=f"category-{category}")])
    writer.close()
