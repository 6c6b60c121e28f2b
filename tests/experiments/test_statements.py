"""Verdicts in a few words from numbers, and the texts of claims and findings."""

from __future__ import annotations

import pytest

from moeless.experiments.statements import (
    Claim,
    Finding,
    Measured,
    Stated,
    claim_record,
    finding_text,
    of_change,
    signed,
    spread,
    stated_text,
    unanimous,
    verdict,
)


@pytest.mark.parametrize(
    ("stated", "ours", "word"),
    [
        (-43.19, -40.0, "agrees"),
        (-43.19, -36.8, "agrees"),
        (-43.19, -20.0, "same direction"),
        (-43.19, 0.3, "no change"),
        (-43.19, 8.0, "opposite"),
        (-92.68, -97.0, "agrees"),
    ],
)
def test_a_verdict_compares_sign_and_size(stated: float, ours: float, word: str) -> None:
    assert of_change(stated, ours) == word


@pytest.mark.parametrize(
    ("stated", "ours", "word"),
    [
        (
            Stated((18.0,), "%", "up to"),
            Measured({"d = 1": 1.0, "d = 5": 16.0}, "points of top-k recall", ""),
            "agrees",
        ),
        (
            Stated((0.2,), "ms", "<"),
            Measured({"32 tokens": 0.1, "512 tokens": 0.3}, "ms", "", on="a CPU"),
            "slower on a CPU",
        ),
        (Stated((1.92, 128.32), "MB"), Measured({"gates": 2.0, "networks": 128.2}, "MiB", ""), "agrees"),
        (Stated((3.84, 120.48), "MB"), Measured({"gates": 7.5, "networks": 241.0}, "MiB", ""), "does not agree"),
    ],
)
def test_bounds_are_held_against_the_largest_and_sizes_one_by_one(stated: Stated, ours: Measured, word: str) -> None:
    assert verdict(stated, ours) == word


def _claim(stated: Stated | None) -> Claim:
    ours = {"paper_rules": Measured({"a": -41.0}, "%", "layer.mean_ms", "paper")}
    ours["live"] = Measured({"bundled": 100.0}, "%", "layer.mean_ms", "live")
    return Claim("id", "a claim", "Megatron-LM", stated, ours, "lower", "simulated", "moeless reproduce fig8")


def test_each_rule_has_its_own_verdict_and_a_missing_one_or_a_live_run_none() -> None:
    record = claim_record(_claim(Stated((-43.19,), "%")))
    assert record["verdict"] == "its rules: agrees"
    assert (record["paper"], record["paper_rules"], record["physical"]) == ("−43.19 %", "−41.0 %", None)
    assert record["live"] == "+100.0 %"
    assert claim_record(_claim(None))["verdict"] == ""
    assert claim_record(_claim(None))["paper"] == "not stated"


def test_what_the_paper_states_is_told_with_its_bound_and_device() -> None:
    assert stated_text(Stated((0.2,), "ms", "<", "on a GPU")) == "< 0.2 ms on a GPU"
    assert stated_text(Stated((18.0,), "%", "up to")) == "up to +18 %"
    assert stated_text(Stated((1.92, 128.32), "MB")) == "1.92 / 128.32 MB"


def test_changes_are_told_with_mean_and_range() -> None:
    assert spread([-30.0, -10.0]) == "−20.0 % (−30.0 to −10.0)"
    assert spread([4.0]) == "+4.0 %"
    assert signed(-0.04) == "0.0 %"


def test_a_finding_tells_its_numbers_one_by_one_or_in_a_row() -> None:
    one = Finding("id", "x", "{about}: mean {mean:.2f}", {"mean": 1.234}, True, "measured", about="{a} model")
    assert finding_text(one) == "{a} model: mean 1.23"
    row = Finding(
        "id",
        "x",
        "{costs} costs: {each}",
        {"a": -3.0, "b": 0.0},
        None,
        "measured",
        each="{name} {value:change}",
        costs="paper",
    )
    assert finding_text(row) == "paper costs: a −3.0 %, b 0.0 %"
    assert (unanimous([True, True]), unanimous([False]), unanimous([True, False])) == (True, False, None)
