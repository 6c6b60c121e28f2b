"""How long a forecast takes on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moeless.contracts import Context, Phase
from moeless.predictors.base import LoadPredictor


def predict_microseconds(
    predictor: LoadPredictor,
    distance: int,
    batch_tokens: Sequence[int],
    repeats: int = 20,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, float]:
    """Median microseconds of one layer's forecast by tokens of the iteration, on made inputs of the model's shape.

    On another device than the CPU a token-level method's weights and gate inputs lie there, as a live layer's do; the
    load's way back to the host is part of the time.
    """
    if device != "cpu":
        predictor.to(device)
    rng = np.random.default_rng(seed)
    spec = predictor.spec
    made: dict[str, float] = {}
    for tokens in batch_tokens:
        reads = predictor.reads
        context = Context(
            _inputs(rng, tokens, spec.hidden_size, device) if reads == "router_inputs" else None,
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


def _inputs(rng: np.random.Generator, tokens: int, width: int, device: str) -> Any:
    made = rng.standard_normal((tokens, width), np.float32)
    return made if device == "cpu" else torch.from_numpy(made).to(device)
