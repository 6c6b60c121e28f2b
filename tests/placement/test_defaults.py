"""The elastic planners' defaults are those that the committed choice on training requests names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeless.placement import PLANNERS

CHOICE = Path(__file__).resolve().parents[2] / "results" / "reference" / "planners" / "choice.json"


@pytest.mark.parametrize("name", ["elastic", "elastic-ahead"])
def test_defaults_are_the_chosen_ones(name):
    chosen, params = json.loads(CHOICE.read_text())["chosen"], PLANNERS.get(name).params()
    wanted = chosen["elastic"] | (chosen[name] if name != "elastic" else {})
    assert {key: getattr(params, key) for key in wanted} == wanted
