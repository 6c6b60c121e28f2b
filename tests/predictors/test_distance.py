"""Choosing how far ahead to forecast each layer."""

from __future__ import annotations

import numpy as np
import pytest

from moeless.contracts import AUTO, Context, Forecast, Phase, Policy
from moeless.errors import UserError
from moeless.predictors.base import LoadPredictor
from moeless.predictors.distance import DistanceRule
from moeless.spec import preset

SPEC = preset("bundled")


class Fading(LoadPredictor):
    """Half as good with every layer of distance; ``before`` is what is known before the iteration."""

    name = "fading"

    def __init__(self, before: float = 0.0, fitted: int = 5) -> None:
        super().__init__(SPEC)
        self.before, self.fitted = before, fitted

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        return self.fallback(context, layer + distance)

    def skill(self, layer, distance, phase, tokens):
        if layer < 0:
            return self.before
        return 0.5**distance if distance <= self.fitted else None


def rule(prepare: float, before: float = 0.0, fitted: int = 5) -> DistanceRule:
    made = DistanceRule(Fading(before, fitted), prepare, 8)
    for layer in range(SPEC.L):
        made.note(layer, Phase.DECODE, 1.0)
    return made


def test_the_nearest_distance_that_leaves_time_to_prepare_is_taken():
    assert rule(0.5).choose(Phase.DECODE, 32).tolist() == [1] * SPEC.L
    # three layers of 1 s each are needed; the first three targets have fewer before them
    assert rule(2.5).choose(Phase.DECODE, 32).tolist() == [1, 2, 3, 3, 3, 3, 3, 3]


def test_where_nothing_is_in_time_the_plan_is_made_before_the_iteration():
    assert rule(100.0).choose(Phase.DECODE, 32).tolist() == list(range(1, SPEC.L + 1))
    assert rule(3.5, fitted=3).choose(Phase.DECODE, 32).tolist() == list(range(1, SPEC.L + 1))


def test_what_is_known_before_is_taken_where_it_is_better():
    assert rule(0.5, before=0.6).choose(Phase.DECODE, 32).tolist() == list(range(1, SPEC.L + 1))
    assert rule(1.5, before=0.2).choose(Phase.DECODE, 32)[3:].tolist() == [2] * (SPEC.L - 3)


def test_slower_layers_shorten_the_distance_of_their_phase_alone():
    made = rule(2.5)
    for _ in range(60):
        for layer in range(SPEC.L):
            made.note(layer, Phase.PREFILL, 3.0)
    assert made.choose(Phase.PREFILL, 512).tolist() == [1] * SPEC.L
    assert made.choose(Phase.DECODE, 32)[-1] == 3


def test_before_anything_has_run_the_farthest_is_taken():
    made = DistanceRule(Fading(), 1.0, 4)
    assert made.choose(Phase.DECODE, 32).tolist() == np.minimum(np.arange(1, SPEC.L + 1), 4).tolist()


def test_auto_is_a_distance_of_the_policy_string():
    policy = Policy.parse("elastic:blend:auto")
    assert policy.distance == AUTO
    assert str(policy) == "elastic:blend:auto"
    with pytest.raises(UserError, match="or auto"):
        Policy.parse("elastic:blend:soon")
