"""What placement knows of an iteration ahead of time, for the gap-closed protocol.

``history`` is the training part's mean load. ``predicted`` is a fitted predictor's forecast of layer l from the expert
ids of layer l - 1 in the same iteration (d = 1), fitted on the training requests alone; the first layer has nothing
before it and gets history. ``noisy`` is the true load within 30 % log-normal noise, ``true`` the true load.

Axes: I iterations, L layers, E experts, T tokens, K experts per token.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from gap_protocol import SEED, Regime, Routing, history_share_LE, routing_path, sample_iterations

from moeless.contracts import Context, FloatArray, Forecast, IntArray
from moeless.predictors import load_predictor
from moeless.predictors.base import WEIGHTS_FILE, LoadPredictor

KNOWLEDGE = ("history", "predicted", "noisy", "true")
NOISE = 0.3
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "gap-closed"
METHOD, FIT_TOKENS = "blend", 150_000


def fitted_predictor(folder: Path | None) -> tuple[LoadPredictor, Path]:
    """The predictor in ``folder``; without one, ``blend`` fitted on the training requests and kept for later."""
    made = folder or CACHE / METHOD
    if folder is None and not made.exists():
        from moeless.predictors.train_evaluate import FitJob, run_fit
        from moeless.spec import preset
        from moeless.traces.importers import IMPORTERS

        trace = CACHE / "gpt-oss-20b"
        if not trace.exists():
            IMPORTERS.get("npz")(routing_path(), trace, preset("gpt-oss-20b"))
        run_fit(FitJob(trace, METHOD, max_tokens=FIT_TOKENS, seed=SEED), made)
    return load_predictor(made), made


def predicted_forecasts(
    routing: Routing, rows_I: list[np.ndarray], regime: Regime, predictor: LoadPredictor, share_LE: FloatArray
) -> list[list[Forecast]]:
    """Forecasts of each iteration's layers from the ids of the layer before."""
    made = []
    for rows in rows_I:
        topk_TLK = routing.topk_TLK[rows].astype(np.int64)
        layers = [_from_history(share_LE[0], len(rows) * routing.spec.K, len(rows))]
        for layer in range(1, topk_TLK.shape[1]):
            context = Context(None, topk_TLK[:, layer - 1], share_LE[layer], None, len(rows), regime.phase)
            layers.append(predictor.predict(context, layer - 1, 1))
        made.append(layers)
    return made


def cached_forecasts(
    routing: Routing, regime: Regime, pairs: int, predictor: LoadPredictor, folder: Path, cache: Path = CACHE
) -> list[list[Forecast]]:
    """:func:`predicted_forecasts` of the protocol's iterations, kept on disk by the predictor's weights."""
    weights = folder / WEIGHTS_FILE
    key = hashlib.sha256(weights.read_bytes() if weights.exists() else predictor.name.encode()).hexdigest()[:16]
    file = cache / f"forecasts-{key}-{regime.phase.name.lower()}-{regime.tokens}-{pairs}.npz"
    if not file.exists():
        rows_I = sample_iterations(routing, regime, pairs)
        made = predicted_forecasts(routing, rows_I, regime, predictor, history_share_LE(routing))
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial.npz")
        np.savez(
            partial,
            mean=[[forecast.mean_E for forecast in layers] for layers in made],
            var=[[forecast.var_E for forecast in layers] for layers in made],
        )
        partial.replace(file)
    with np.load(file) as data:
        return [
            [
                Forecast(mean_E, var_E, regime.tokens, predictor.name)
                for mean_E, var_E in zip(means, spreads, strict=True)
            ]
            for means, spreads in zip(data["mean"], data["var"], strict=True)
        ]


def forecasts(know: str, tokens: int, share_LE: FloatArray, load_LE: IntArray, iteration: int) -> list[Forecast]:
    """What placement is told of an iteration's layers, for every knowledge but ``predicted``."""
    made = []
    for layer, (share_E, load_E) in enumerate(zip(share_LE, load_LE, strict=True)):
        if know == "history":
            made.append(_from_history(share_E, int(load_E.sum()), tokens))
            continue
        mean_E = load_E.astype(np.float64)
        if know == "noisy":
            mean_E *= np.exp(np.random.default_rng([SEED, iteration, layer]).normal(0, NOISE, len(load_E)))
            mean_E *= load_E.sum() / max(mean_E.sum(), 1e-9)
        var_E = (NOISE * mean_E) ** 2 if know == "noisy" else np.zeros_like(mean_E)
        made.append(Forecast(mean_E, var_E, tokens, know))
    return made


def _from_history(share_E: FloatArray, assigned: int, tokens: int) -> Forecast:
    mean_E = share_E * assigned
    return Forecast(mean_E, mean_E.copy(), tokens, "history")
