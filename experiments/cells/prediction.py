"""Load predictors: fitted and measured ones as artefacts, and what is read from them.

Fits are repeatable to the byte; how long one took is not, and is kept beside it in ``timing.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import moeless
from moeless.contracts import Phase
from moeless.experiments.cache import TIMING, machine
from moeless.files import read_json, write_json
from moeless.predictors import load_predictor
from moeless.predictors.evaluation import Evaluator, predict_microseconds
from moeless.predictors.fitting import pairs_of
from moeless.predictors.iterations import iterations_of
from moeless.predictors.request_split import split_requests
from moeless.predictors.trace_rows import Rows
from moeless.predictors.train_evaluate import FitJob, run_fit
from moeless.traces import TokenTrace, open_trace

#: Notes of ``metrics.json`` that are wall-clock time, or name the folder that the cache happens to lie in.
_CLOCK = ("fit_seconds", "predict_microseconds")
_PLACE = ("trace",)


def fit(params: dict[str, Any], needs: list[Any], folder: Path) -> None:
    """Fit a predictor on the training requests of ``needs[0]`` and measure it on the test requests.

    Params: ``method``, ``distances``, ``max_tokens``, ``batch_tokens``, ``evaluate``, ``seed``.
    """
    bundled = open_trace(Path(needs[0])).spec.name == "bundled"
    model = str(Path(moeless.__file__).parent / "assets" / "model") if bundled else None
    job = FitJob(
        trace=Path(needs[0]),
        method=params["method"],
        distances=tuple(params["distances"]),
        model=model,
        max_tokens=params["max_tokens"],
        device="cpu",
        evaluate=params["evaluate"],
        batch_tokens=tuple(params["batch_tokens"]),
        seed=params["seed"],
    )
    run_fit(job, folder)
    clock: dict[str, Any] = {"machine": machine()}
    for name in ("predictor.json", "metrics.json"):
        if not (folder / name).exists():
            continue
        data = read_json(folder / name)
        notes = data.get("notes", {})
        clock |= {key: notes[key] for key in _CLOCK if key in notes}
        data["notes"] = {key: value for key, value in notes.items() if key not in (*_CLOCK, *_PLACE)}
        write_json(folder / name, data)
    write_json(folder / TIMING, clock)


def measured(params: dict[str, Any], needs: list[Any]) -> dict[str, Any]:
    """The rows and the size of a fitted predictor, from its ``metrics.json``."""
    data = read_json(Path(needs[0]) / "metrics.json")
    kept = ("memory_bytes", "parameters")
    return {"rows": data["rows"], "notes": {name: data["notes"].get(name) for name in kept}}


def timing(params: dict[str, Any], needs: list[Any]) -> dict[str, Any]:
    """Microseconds of one layer's forecast by tokens of the iteration, timed now, and seconds that the fit took.

    ``fit_machine`` names the processor of another machine that a shared cache has the fit from; it is None otherwise.

    Params: ``distance``, ``batch_tokens``.
    """
    predictor = load_predictor(Path(needs[0]))
    clock = read_json(Path(needs[0]) / TIMING)
    return {
        "fit_seconds": clock["fit_seconds"],
        "fit_machine": None if clock["machine"] == machine() else clock["machine"]["cpu"],
        "predict_microseconds": predict_microseconds(predictor, params["distance"], params["batch_tokens"]),
    }


def similarity(params: dict[str, Any], needs: list[Any]) -> dict[str, Any]:
    """Mean cosine of a token's gate inputs in layers l and l + d, ``[d][l]``.

    Params: ``distances``, ``tokens`` (evenly spaced over the trace), ``seed``.
    """
    trace = open_trace(Path(needs[0]))
    assert isinstance(trace, TokenTrace)
    step = max(1, trace.num_rows // params["tokens"])
    chunks = [trace.router_inputs(at, at + 1) for at in range(0, trace.num_rows, step)]
    input_TLH = np.concatenate(chunks).astype(np.float64)
    unit_TLH = input_TLH / np.linalg.norm(input_TLH, axis=2, keepdims=True)
    layers = input_TLH.shape[1]
    cosine = {
        str(d): [float((unit_TLH[:, layer] * unit_TLH[:, layer + d]).sum(1).mean()) for layer in range(layers - d)]
        for d in params["distances"]
        if d < layers
    }
    return {"tokens": len(input_TLH), "cosine": cosine}


def correlation(params: dict[str, Any], needs: list[Any]) -> dict[str, Any]:
    """Predicted and true loads of test iterations, for a scatter; ``needs`` are the trace and the predictor.

    Params: ``distance``, ``batch_tokens``, ``iterations``, ``points`` (shown at most), ``seed``.
    """
    trace = open_trace(Path(needs[0]))
    assert isinstance(trace, TokenTrace)
    predictor = load_predictor(Path(needs[1]))
    rows = Rows(trace)
    split = split_requests(trace.requests.category, "request", params["seed"])
    distance, size = params["distance"], params["batch_tokens"]
    evaluator = Evaluator(rows, split, (distance,), (size,), resamples=2, seed=params["seed"])
    pairs = pairs_of(trace.spec.L, (distance,))
    tokens = evaluator.token_loads(predictor, pairs)
    iterations = iterations_of(rows, evaluator.requests, Phase.DECODE, size, params["iterations"], params["seed"])
    predicted, true = [], []
    for layer, _ in pairs:
        mean_IE, _, load_IE = evaluator.forecasts(predictor, tokens, layer, distance, iterations)
        predicted.append(mean_IE.ravel())
        true.append(load_IE.ravel())
    x, y = np.concatenate(true).astype(np.float64), np.concatenate(predicted)
    keep = np.sort(np.random.default_rng(params["seed"]).permutation(len(x))[: params["points"]])
    return {
        "pearson": float(np.corrcoef(x, y)[0, 1]),
        "pairs": len(x),
        "iterations": len(iterations),
        "true": x[keep].tolist(),
        "predicted": [round(value, 4) for value in y[keep].tolist()],
    }
