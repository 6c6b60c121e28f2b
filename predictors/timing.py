"""How long a forecast takes on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from moeless.contracts import Context, Phase
from moeless.predictors.base import LoadPredictor


def predict_microseconds(
    predictor: LoadPredictor, distance: int, batch_tokens: Sequence[int], repeats: int = 20, seed: int = 0
) -> dict[str, float]:
    """Median microseconds of one layer's forecast by tokens of the iteration, on made inputs of the model's shape."""
    rng = np.random.default_rng(seed)
    spec = predictor.spec
    made: dict[str, float] = {}
    for tokens in batch_tokens:
        reads = predictor.reads
        context = Context(
            rng.standard_normal((tokens, spec.hidden_size), np.float32) if reads == "router_inputs" else None,
            rng.random((tokens, spec.E)).argsort(1)[:, : spec.K] if reads == "topk" else None,
            np.full(spec.E, 1.0 / spec.E),
            rng.integers(1, 10, spec.E),
            tokens,
            Phase.DECODE,
            rng.integers(1, 10, spec.E),
        )
        seconds = []
        for _ in range(repeats + 2):
            started = time.perf_counter()
            predictor.predict(context, 0, distance)
            seconds.append(time.perf_counter() - started)
        made[str(tokens)] = round(float(np.median(seconds[2:])) * 1e6, 1)
    return made
