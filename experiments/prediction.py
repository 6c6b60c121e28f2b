"""What the predictor figures share: methods, jobs, and how rows are read back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from moeless.experiments.base import Job, Options
from moeless.experiments.sources import DISTANCES, Source, fitted_predictor, given, input_sources
from moeless.report.line_figures import Line

_PREDICTION = "moeless.experiments.cells.prediction"
#: Method to the name in figures.
METHODS = {"gate_reuse": "raw next gates", "layer_aware": "fine-tuned gates"}
#: The paper's three, then ours and what needs no fitting.
COMPARED = METHODS | {"from_scratch": "networks from scratch"}
LOADS = COMPARED | {"blend": "blend (ours)", "history": "history"}
#: Methods that expert ids suffice for.
IDS = {"transition": "expert ids alone", "blend": "blend (ours)", "last": "last iteration", "history": "history"}


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


def source_of_pair(options: Options) -> tuple[Source, dict[str, str]]:
    """A trace with gate inputs and the two kinds of gates; else the reader's first, with what ids alone allow."""
    if input_sources(options):
        return source(options), METHODS
    return given(options)[0], {method: IDS[method] for method in ("history", "transition")}


def source_of_loads(options: Options) -> tuple[Source, dict[str, str]]:
    """A trace with gate inputs, else the reader's first, and the methods whose load forecasts it allows to compare."""
    return (source(options), LOADS) if input_sources(options) else (given(options)[0], IDS)


def measured_jobs(options: Options) -> dict[str, Job]:
    """What the gates, raw and fine-tuned, measured on the test requests."""
    return jobs_of(options, source(options), METHODS)


def jobs_of(options: Options, where: Source, methods: Iterable[str]) -> dict[str, Job]:
    """What methods measured on a source's test requests."""
    return {
        method: Job(
            f"read how {method} did on {where.title}",
            f"{_PREDICTION}:measured",
            {},
            (fitted_predictor(options, where, method),),
        )
        for method in methods
    }


def timing_job(options: Options, method: str) -> Job:
    """How long a method's fit and forecasts take."""
    where = source(options)
    params = {"distance": 1, "batch_tokens": [32, 512]}
    fitted = fitted_predictor(options, where, method)
    return Job(f"time {method} on {where.title}", f"{_PREDICTION}:timing", params, (fitted,), timed=True)


def per_layer(
    found: Mapping[str, Any], metric: str, distance: int, batch_tokens: int = 1, phase: str = "all"
) -> Line | None:
    """A metric over source layers, with its interval."""
    rows = [
        row
        for row in found["rows"]
        if (row["metric"], row["distance"], row["batch_tokens"]) == (metric, distance, batch_tokens)
        and row["phase"] == phase
        and row["layer"] >= 0
    ]
    if not rows:
        return None
    rows.sort(key=lambda row: row["layer"])
    return Line(*[[row[name] for row in rows] for name in ("layer", "value", "low", "high")])


def over_distance(found: Mapping[str, Any], metric: str, batch_tokens: int = 1, phase: str = "all") -> Line:
    """A metric's mean over layers at every distance; the band is the mean of the layers' intervals."""
    kept: list[list[float]] = []
    for distance in DISTANCES:
        line = per_layer(found, metric, distance, batch_tokens, phase)
        if line is not None and line.low is not None and line.high is not None:
            bands = np.array([line.y, line.low, line.high], np.float64)
            kept.append([distance, *bands.mean(1).tolist()])
    return Line(*[[row[column] for row in kept] for column in range(4)])


def samples(found: Mapping[str, Any], metric: str = "topk_recall") -> int:
    """How many requests a figure stands on."""
    return max((int(row["n"]) for row in found["rows"] if row["metric"] == metric), default=0)
