"""A field that is an option carries its checks, its text forms and its place in help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from moeless.configuration import Component, check_backend, inherited, option, options, typed
from moeless.contracts import Request
from moeless.errors import UserError
from moeless.simulator.options import BenchConfig
from moeless.workloads.options import Batching


@dataclass(frozen=True, kw_only=True)
class Oven(Component, group="Oven"):
    degrees: float = option(180.0, "--degrees", "Celsius.", minimum=20)
    mode: Literal["fan", "grill"] = option("fan", "--mode", "How.")
    trays: tuple[int, ...] = option(
        (), "--tray", "Levels.", read=lambda texts: tuple(map(int, texts)), show=lambda trays: list(map(str, trays))
    )
    colour: str = "white"


@dataclass(frozen=True, kw_only=True)
class Stove(Oven):
    degrees: float = 200.0
    plates: int = option(4, "--plates/--no-plates", "How many.", live_key="rings")


def test_a_configuration_inherits_options_and_may_change_their_defaults() -> None:
    assert {name: known.default for name, known in options(Stove).items()} == {
        "degrees": 200.0,
        "mode": "fan",
        "trays": None,
        "plates": 4,
    }
    assert options(Stove)["trays"].kind == list[str]
    assert {known.group for known in options(Stove).values()} == {"Oven"}
    assert inherited(Oven, Stove()) == {"degrees": 200.0, "mode": "fan", "trays": (), "colour": "white"}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"degrees": 19.0}, "--degrees must be at least 20, got 19.0"),
        ({"degrees": float("nan")}, "--degrees must be at least 20, got nan"),
        ({"mode": "steam"}, "--mode is 'steam', it must be fan or grill"),
    ],
)
def test_a_value_out_of_its_range_is_refused_wherever_it_comes_from(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as direct:
        Oven(**values)
    with pytest.raises(UserError) as given:
        Stove.given(values)
    assert str(direct.value) == str(given.value) == sentence


def test_what_was_typed_becomes_values_and_what_was_not_the_default() -> None:
    made = Stove.given({"trays": ["1", "3"], "degrees": None, "unknown": 1}, plates=2)
    assert made == Stove(trays=(1, 3), plates=2)


def test_printed_values_become_what_would_be_typed() -> None:
    printed = {"degrees": 50.0, "trays": [1, 3], "nested": {"rings": 2}, "colour": "white", "handle": None}
    assert typed(printed, [Stove]) == {"degrees": 50.0, "trays": ["1", "3"], "plates": 2, "handle": None}
    assert typed({"colour": "red"}, [Stove]) == {"colour": "red"}


def test_options_of_another_backend_are_named() -> None:
    defaults = {name: known.default for name, known in options(Stove).items()}
    check_backend({"a": Oven, "b": Stove}, "a", defaults)
    with pytest.raises(UserError, match=r"^--plates belongs to --backend b$"):
        check_backend({"a": Oven, "b": Stove}, "a", defaults | {"plates": 5})
    with pytest.raises(UserError, match=r"^--no-plates belongs to --backend b$"):
        check_backend({"a": Oven, "b": Stove}, "a", defaults | {"plates": False})


def test_a_benchmark_made_in_python_is_checked_like_a_typed_one() -> None:
    with pytest.raises(UserError, match="--lengths is 'both', it must be trace or arrival"):
        BenchConfig(trace=None, policies=(), lengths="both")


def test_budget_and_limit_hold_for_continuous_batching_with_words() -> None:
    requests = [Request(0, 0.0, 6, 1)]
    with pytest.raises(UserError, match="allow chunked prefill or raise the budget"):
        Batching(batching="continuous:whole-prompts", token_budget=5).scheduler(requests, 1)
