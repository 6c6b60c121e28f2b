"""Every planner can be searched, in ranges that the user may replace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from moeless.errors import UserError
from moeless.placement import PLANNERS, Planner
from moeless.placement.dispatch import EVEN
from moeless.tuning.space import SERVERLESS, Axis, parse_ranges, search_space

DEFAULTS = {"extra_slots": 1, "keep_alive": 10.0, "scale_to_zero": False, "replan_seconds": 600.0}


@dataclass(frozen=True)
class Params:
    """One parameter of each kind."""

    weight: float = 0.5
    rounds: int = 8
    flag: bool = True
    rule: Literal["a", "b"] = "a"
    cap: float | None = None
    zero: int = 0
    named: float = field(default=0.0, metadata={"tune": (-1.0, 1.0)})


def planner(cadence: str = "iteration") -> Planner:
    return Planner(
        name="made",
        dispatch=EVEN,
        params=Params,
        cadence=cadence,  # type: ignore[arg-type]
        needs_forecast=True,
        default_predictor="history",
        source="test",
        plan_layer=PLANNERS.get("static").plan,
    )


def test_axes_follow_the_fields_types_and_metadata():
    axes, left = search_space(planner(), DEFAULTS, {})
    by_name = {axis.name: axis for axis in axes}
    assert by_name["weight"] == Axis("weight", 0.1, 2.5, log=True)
    assert by_name["rounds"] == Axis("rounds", 1, 40, whole=True, log=True)
    assert by_name["flag"].choices == (False, True)
    assert by_name["rule"].choices == ("a", "b")
    assert by_name["named"] == Axis("named", -1.0, 1.0)
    assert left == ("cap", "zero")


@pytest.mark.parametrize(
    ("cadence", "expected"),
    [
        ("iteration", {"extra_slots", "keep_alive", "scale_to_zero"}),
        ("interval", {"extra_slots", "replan_seconds"}),
        ("once", {"extra_slots"}),
    ],
)
def test_serverless_settings_are_searched_where_they_matter(cadence: str, expected: set[str]):
    axes, _ = search_space(planner(cadence), DEFAULTS, {})
    assert {axis.name for axis in axes} & set(SERVERLESS) == expected


def test_given_ranges_replace_the_derived_ones():
    ranges = parse_ranges(
        ["weight=0:1", "rounds=2,4", "cap=1:10:log", "zero=1:3", "extra-slots=2", "rule=b", "flag=true"]
    )
    axes, left = search_space(planner(), DEFAULTS, ranges)
    by_name = {axis.name: axis for axis in axes}
    assert by_name["weight"] == Axis("weight", 0.0, 1.0)
    assert by_name["rounds"].choices == (2, 4)
    assert by_name["cap"] == Axis("cap", 1.0, 10.0, log=True)
    assert by_name["zero"] == Axis("zero", 1.0, 3.0, whole=True)
    assert by_name["extra_slots"].choices == (2,)
    assert by_name["rule"].choices == ("b",)
    assert by_name["flag"].choices == (True,)
    assert left == ()


def test_a_keep_alive_is_searched_as_seconds_or_by_name():
    axes, _ = search_space(planner(), DEFAULTS, parse_ranges(["keep_alive=0,2.5,lru,adaptive:3"]))
    assert {axis.name: axis for axis in axes}["keep_alive"].choices == (0.0, 2.5, "lru", "adaptive:3")
    axes, _ = search_space(planner(), DEFAULTS, parse_ranges(["keep_alive=1:20"]))
    assert {axis.name: axis for axis in axes}["keep_alive"] == Axis("keep_alive", 1.0, 20.0)


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["weight"], "not of the form name=low:high"),
        (["=1:2"], "not of the form name=low:high"),
        (["nope=1:2"], "has no parameter 'nope' to tune; there are: weight"),
        (["weight=1:2:3"], "not of the form low:high"),
        (["weight=2:1"], "must ascend"),
        (["weight=0:1:log"], "must begin above 0"),
        (["weight=a:1"], "takes numbers, not 'a'"),
        (["rounds=1.5"], "takes whole numbers, not '1.5'"),
        (["rounds=1:2.5"], "is a whole number"),
        (["flag=maybe"], "true or false, not 'maybe'"),
        (["rule=a:b"], "not of the form low:high"),
        (["replan_seconds=1:2"], "has no parameter 'replan_seconds'"),
        (["keep_alive=1,soon"], "is none of SECONDS"),
    ],
)
def test_a_wrong_range_gives_one_sentence(texts: list[str], sentence: str):
    with pytest.raises(UserError, match=sentence):
        search_space(planner(), DEFAULTS, parse_ranges(texts))


@pytest.mark.parametrize("name", PLANNERS.names())
def test_every_planner_is_searchable_or_says_that_there_is_nothing(name: str):
    chosen = PLANNERS.get(name)
    if not chosen.needs_forecast:
        with pytest.raises(UserError, match="has nothing to tune"):
            search_space(chosen, DEFAULTS, {})
        return
    axes, left = search_space(chosen, DEFAULTS, {})
    own = chosen.params()
    assert len({axis.name for axis in axes}) == len(axes)
    for axis in axes:
        default = DEFAULTS[axis.name] if axis.name in SERVERLESS else getattr(own, axis.name)
        assert axis.holds(default), f"{name}'s default {axis.name} lies in its range"
    assert not {axis.name for axis in axes} & set(left)
