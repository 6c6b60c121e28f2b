"""Verdicts in a few words, from changes in per cent."""

from __future__ import annotations

import pytest

from moeless.experiments.serving import signed, spread
from moeless.experiments.verdicts import of_change, of_rules


@pytest.mark.parametrize(
    ("stated", "ours", "word"),
    [
        (-43.19, -40.0, "agrees"),
        (-43.19, -36.8, "agrees"),
        (-43.19, -20.0, "same direction"),
        (-43.19, 0.3, "no change"),
        (-43.19, 8.0, "opposite"),
        (-92.68, -97.0, "agrees"),
        (-43.19, None, ""),
    ],
)
def test_a_verdict_compares_sign_and_size(stated: float, ours: float | None, word: str) -> None:
    assert of_change(stated, ours) == word


def test_each_rule_has_its_own_verdict_and_a_missing_one_none() -> None:
    found = of_rules(-43.19, {"its rules": -41.0, "physical": None})
    assert found == "its rules: agrees"


def test_changes_are_told_with_mean_and_range() -> None:
    assert spread([-30.0, -10.0]) == "−20.0 % (−30.0 to −10.0)"
    assert spread([4.0]) == "+4.0 %"
    assert spread([]) is None
    assert signed(-0.04) == "0.0 %"
