"""Artefacts: made-up routing for models whose weights are out of reach, always labelled synthetic."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any


def trace(params: dict[str, Any], needs: list[Any], folder: Path) -> None:
    """Write a token trace.

    Params: ``model`` (a preset), ``requests``, ``prompt_tokens`` and ``output_tokens`` (means of geometric lengths),
    ``dataset`` (with the model it keys popularity, so that two data sets differ), ``seed``.
    """
    from moeless.spec import preset
    from moeless.traces.synthetic import SyntheticParams, write_synthetic

    made = SyntheticParams(prompt_tokens=float(params["prompt_tokens"]), output_tokens=float(params["output_tokens"]))
    write_synthetic(
        folder,
        preset(params["model"]),
        requests=params["requests"],
        params=made,
        seed=zlib.crc32(f"{params['seed']} {params['model']} {params['dataset']}".encode()),
        calibrated_from=f"the generator's defaults, a stand-in for {params['dataset']}",
    )
