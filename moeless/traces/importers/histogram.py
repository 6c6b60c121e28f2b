"""Importer of an expert-popularity histogram: a synthetic trace with that popularity."""

from __future__ import annotations

from pathlib import Path

from moeless.spec import MoESpec
from moeless.traces.info import TraceInfo
from moeless.traces.synthetic import popularity_from_histogram, write_synthetic

REQUESTS = 256


def import_histogram(path: Path, out: Path, spec: MoESpec) -> TraceInfo:
    """Write a synthetic token trace whose categories have the popularity of the file's data sets.

    Raises:
        UserError: the file breaks the layout ``{name: {expert_popularity: [layers][experts]}}`` or does not fit.
    """
    shares, name = popularity_from_histogram(path, spec)
    return write_synthetic(out, spec, requests=REQUESTS, share_CLE=shares, calibrated_from=name)
