"""What the predictor figures share: methods, jobs, and how rows are read back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments.base import Job, Options
from moeless.experiments.sources import DISTANCES, Source, fitted_predictor, input_sources
from moeless.report.line_figures import Line

_PREDICTION = "moeless.experiments.cells.prediction"
#: Method to the name in figures.
METHODS = {"gate_reuse": "raw next gates", "layer_aware": "fine-tuned gates"}


def source(options: Options) -> Source:
    """A trace with gate inputs: the first of the reader's that holds them, or the bundled model's."""
    return input_sources(options)[0]


def lacks(options: Options) -> str | None:
    """Why figures about gate inputs cannot be drawn."""
    if input_sources(options):
        return None
    return (
        "no trace given holds gate inputs, which it is about; record them with `moeless trace --router-inputs`, or add "
        "--beside for the bundled model's"
    )


def measured_jobs(options: Options) -> dict[str, Job]:
    """What each method measured on the test requests."""
    where = source(options)
    return {
        method: Job(
            f"read how {method} did on {where.title}",
            f"{_PREDICTION}:measured",
            {},
            (fitted_predictor(options, where, method),),
        )
        for method in METHODS
    }


def timing_job(options: Options, method: str) -> Job:
    """How long a method's fit and forecasts take."""
    where = source(options)
    params = {"distance": 1, "batch_tokens": [32, 512]}
    fitted = fitted_predictor(options, where, method)
    return Job(f"time {method} on {where.title}", f"{_PREDICTION}:timing", params, (fitted,), timed=True)


def per_layer(found: Mapping[str, Any], metric: str, distance: int, batch_tokens: int = 1) -> Line | None:
    """A metric over source layers, with its interval."""
    rows = [
        row
        for row in found["rows"]
        if (row["metric"], row["distance"], row["batch_tokens"]) == (metric, distance, batch_tokens)
    ]
    if not rows:
        return None
    rows.sort(key=lambda row: row["layer"])
    return Line(*[[row[name] for row in rows] for name in ("layer", "value", "low", "high")])


def over_distance(found: Mapping[str, Any], metric: str, batch_tokens: int = 1) -> Line:
    """A metric's mean over layers at every distance; the band is the mean of the layers' intervals."""
    kept: list[list[float]] = []
    for distance in DISTANCES:
        line = per_layer(found, metric, distance, batch_tokens)
        if line is not None and line.low is not None and line.high is not None:
            bands = np.array([line.y, line.low, line.high], np.float64)
            kept.append([distance, *bands.mean(1).tolist()])
    return Line(*[[row[column] for row in kept] for column in range(4)])


def samples(found: Mapping[str, Any], metric: str = "topk_recall") -> int:
    """How many requests a figure stands on."""
    return max((int(row["n"]) for row in found["rows"] if row["metric"] == metric), default=0)
