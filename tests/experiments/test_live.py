"""What a page says of a live run follows from the run, not from the machine that the code was written on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from moeless.experiments.base import Options
from moeless.experiments.catalogue import find
from moeless.metrics import schema
from moeless.metrics.result import read_result

RESULT = Path(__file__).resolve().parents[1] / "fixtures" / "results" / "result.json"


@pytest.mark.parametrize(
    ("layer_time", "cores", "says"),
    [
        ("wall clock", 64, "have 64 processor cores here, so a layer's time is the slowest rank's by the clock, the"),
        ("own compute, exchange left out", 2, "the exchange between ranks is left out"),
    ],
)
def test_the_page_says_how_the_live_layers_were_timed(layer_time: str, cores: int, says: str) -> None:
    cells: list[dict[str, Any]] = []
    for cell in read_result(RESULT).cells:
        settings = {**cell.settings, "layer_time": layer_time}
        cells.append(schema.to_json(dataclasses.replace(cell, evidence="measured", settings=settings)))
    (experiment,) = find("live")
    drawn = experiment.draw(Options(), {"live": {"cells": cells, "cores": cores, "host": "transformers"}})
    plt.close("all")
    assert says in " ".join(drawn.text)
    assert ("left out" in " ".join(drawn.text)) == (layer_time != "wall clock")
