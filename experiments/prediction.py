"""What the predictor figures share: methods, jobs, and how rows are read back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.errors import UserError
from moeless.experiments.base import Job, Options
from moeless.experiments.sources import DISTANCES, Source, bundled, fitted_predictor, given
from moeless.report.line_figures import Line

_PREDICTION = "moeless.experiments.cells.prediction"
#: Method to the name in figures.
METHODS = {"gate_reuse": "raw next gates", "layer_aware": "fine-tuned gates"}


def source(options: Options) -> Source:
    """A trace with gate inputs: the reader's, or the bundled model's.

    Raises:
        UserError: the reader's trace holds no gate inputs.
    """
    mine = given(options)
    if mine is None:
        return bundled(options)
    from moeless.traces import TokenTrace, open_trace

    opened = open_trace(options.trace) if options.trace is not None else None
    if not isinstance(opened, TokenTrace) or not opened.has_router_inputs:
        raise UserError(
            f"{options.trace} holds no gate inputs, which this figure is about; record them with "
            "`moeless trace --router-inputs`"
        )
    return mine


def usable(options: Options) -> bool:
    """Whether gate inputs are at hand."""
    try:
        source(options)
    except UserError:
        return False
    return True


def measured_jobs(options: Options) -> dict[str, Job]:
    """What each method measured on the test requests."""
    where = source(options)
    return {
        method: Job(
            f"read how {method} did on {where.title}",
            f"{_PREDICTION}:measured",
            {},
            (fitted_predictor(options, where, method),),
            timed=True,
        )
        for method in METHODS
    }


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
