"""Plain data refuses what breaks its contract and survives its file form."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.contracts import (
    Budget,
    Forecast,
    Iteration,
    LayerPlan,
    ModelPlan,
    Phase,
    Policy,
    Span,
    check_load,
)
from moeless.errors import UserError


@st.composite
def plans(draw: st.DrawFn) -> tuple[LayerPlan, int, int]:
    experts, gpus = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    extras = draw(st.lists(st.integers(0, experts - 1), max_size=8))
    ids = [*range(experts), *extras]
    on = draw(st.lists(st.integers(0, gpus - 1), min_size=len(ids), max_size=len(ids)))
    primary = [True] * experts + [False] * len(extras)
    order = draw(st.permutations(range(len(ids))))
    plan = LayerPlan.build(
        0,
        [ids[i] for i in order],
        [on[i] for i in order],
        [primary[i] for i in order],
        num_experts=experts,
        num_gpus=gpus,
    )
    return plan, experts, gpus


@given(plans())
def test_building_a_plan_sorts_it_and_keeps_every_replica(made: tuple[LayerPlan, int, int]) -> None:
    plan, experts, gpus = made
    plan.validate(num_experts=experts, num_gpus=gpus)
    assert plan.replicas_E(experts).sum() == plan.slots_G(gpus).sum() == plan.R == experts + plan.num_extra
    again = LayerPlan.from_json(json.loads(json.dumps(plan.to_json())), num_experts=experts, num_gpus=gpus)
    assert np.array_equal(again.expert_R, plan.expert_R)
    assert np.array_equal(again.gpu_R, plan.gpu_R)
    assert np.array_equal(again.primary_R, plan.primary_R)


@pytest.mark.parametrize(
    ("expert", "gpu", "primary", "words"),
    [
        ([0, 1, 1], [0, 0, 1], [True, True, True], "2 primaries"),
        ([0], [0], [True], "0 primaries"),
        ([0, 2], [0, 0], [True, True], "outside 0..1"),
        ([0, 1], [0, 5], [True, True], "GPU id"),
    ],
)
def test_a_broken_plan_is_named(expert: list[int], gpu: list[int], primary: list[bool], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LayerPlan.build(0, expert, gpu, primary, num_experts=2, num_gpus=2)


def test_a_model_plan_needs_its_layers_in_order() -> None:
    layer = LayerPlan.build(1, [0], [0], [True], num_experts=1, num_gpus=1)
    with pytest.raises(UserError, match="position 0"):
        ModelPlan("m", 1, 1, "static", (layer,))


@pytest.mark.parametrize("broken", [{}, {"layers": 3}, [], None, {"num_experts": 1, "num_gpus": 1, "layers": [{}]}])
def test_a_file_that_is_no_plan_is_refused(broken: object) -> None:
    with pytest.raises(UserError, match="not a"):
        ModelPlan.from_json(broken)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mean", "var"), [([np.nan, 1], [0, 0]), ([-1, 2], [0, 0]), ([1, 1], [0]), ([1, 1], [0, -1]), ([np.inf, 1], [0, 0])]
)
def test_a_forecast_refuses_values_that_are_no_loads(mean: list[float], var: list[float]) -> None:
    with pytest.raises(UserError):
        Forecast(np.array(mean), np.array(var), 1, "test")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("static", Policy("static")),
        ("eplb:history", Policy("eplb", "history", 1)),
        ("elastic:blend:2", Policy("elastic", "blend", 2)),
    ],
)
def test_a_policy_reads_as_written(text: str, expected: Policy) -> None:
    assert Policy.parse(text) == expected
    assert Policy.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["", ":", "a:", "a:b:0", "a:b:x", "a:b:1:2"])
def test_a_malformed_policy_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        Policy.parse(text)


def test_an_iteration_is_mixed_when_its_spans_differ() -> None:
    prefill, decode = Span(0, 0, 5, Phase.PREFILL), Span(1, 7, 8, Phase.DECODE)
    assert Iteration(0, (prefill, decode), {0: 0, 1: 0}).phase is Phase.MIXED
    assert Iteration(0, (decode,), {1: 0}).phase is Phase.DECODE
    assert Iteration(0, (prefill, decode), {0: 0, 1: 0}).tokens == 6


def test_an_even_budget_has_room_for_static_primaries() -> None:
    budget = Budget.even(num_experts=10, num_gpus=4, extra_slots=2, expert_bytes=3.0)
    assert budget.slots_G.tolist() == [5] * 4
    assert budget.bytes_G.tolist() == [15.0] * 4
    assert budget.max_extra == 8


@pytest.mark.parametrize("bad", [[1, 2], [[-1]], [[0.5]], [[np.nan]]])
def test_loads_are_whole_tokens_by_source_rank(bad: object) -> None:
    with pytest.raises(UserError):
        check_load(bad)  # type: ignore[arg-type]
