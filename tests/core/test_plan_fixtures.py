"""Plan files written by earlier versions stay readable, and mean what they meant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moeless.contracts import ModelPlan
from moeless.files import read_json
from moeless.placement import PLANNERS

PLANS = sorted((Path(__file__).resolve().parents[1] / "fixtures" / "plans").glob("*.json"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_stored_plan_reads_back_to_the_same_file(path: Path) -> None:
    data = read_json(path)
    plan = ModelPlan.from_json(data)
    assert plan.planner == path.stem
    assert plan.planner in PLANNERS.names()
    assert plan.to_json() == data


def test_elastic_and_static_share_their_primaries() -> None:
    static, elastic = (ModelPlan.from_json(read_json(PLANS[0].with_stem(name))) for name in ("static", "elastic"))
    assert sum(layer.num_extra for layer in static.layers) == 0
    assert sum(layer.num_extra for layer in elastic.layers) > 0
    for one, two in zip(static.layers, elastic.layers, strict=True):
        place = [
            dict(zip(p.expert_R[p.primary_R].tolist(), p.gpu_R[p.primary_R].tolist(), strict=True)) for p in (one, two)
        ]
        assert place[0] == place[1]
        assert np.array_equal(np.sort(one.expert_R), np.arange(static.num_experts))
