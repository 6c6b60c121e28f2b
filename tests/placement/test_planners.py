"""What every planner keeps: experts served, caps held, determinism, degenerate input as a plan or a sentence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.contracts import Budget, Forecast
from moeless.errors import UserError
from moeless.placement import PLANNERS
from moeless.placement.params import make_params, parse_assignments
from moeless.placement.whole_model import spread_over_sources

EXPERT_BYTES = 3 * 2880 * 2880 * 2
ONLINE = [name for name in PLANNERS.names() if name != "milp"]
loads = st.lists(st.integers(0, 20_000), min_size=1, max_size=24)


@pytest.mark.parametrize("name", ONLINE)
@given(load=loads, gpus=st.integers(1, 10), extra=st.integers(0, 2))
@settings(max_examples=20, deadline=None)
def test_every_expert_is_served_within_the_caps(plan_with, name, load, gpus, extra):
    budget = Budget.even(len(load), gpus, extra, EXPERT_BYTES)
    plan = plan_with(name, load, gpus, extra)
    plan.validate(num_experts=len(load), num_gpus=gpus)
    assert (plan.replicas_E(len(load)) >= 1).all()
    assert (plan.slots_G(gpus) <= budget.slots_G).all()
    assert plan.num_extra <= budget.max_extra
    assert plan.to_json() == plan_with(name, load, gpus, extra).to_json()
    again = plan_with(name, load[::-1], gpus, extra, previous=plan)
    assert (again.slots_G(gpus) <= budget.slots_G).all()


@given(order=st.permutations(range(16)), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("name", ["eplb", "moeless"])
def test_relabelling_experts_keeps_the_gpu_loads(plan_with, name, order, seed):
    load = np.random.default_rng(seed).choice(10_000, 16, replace=False) + 1.0

    def gpu_loads(weight):
        plan = plan_with(name, weight, 4, 1)
        share = weight[plan.expert_R] / plan.replicas_E(16)[plan.expert_R]
        return np.sort(np.bincount(plan.gpu_R, weights=share, minlength=4))

    np.testing.assert_allclose(gpu_loads(load), gpu_loads(load[np.array(order)]), rtol=1e-5)


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize(
    ("load", "gpus", "extra"),
    [
        ([0.0] * 8, 4, 1),
        ([1e6] + [0.0] * 7, 4, 1),
        ([5.0] * 8, 1, 1),
        ([5.0, 3.0], 7, 1),
        (list(range(8)), 8, 0),
        (list(range(10)), 4, 1),
    ],
)
def test_degenerate_input_gives_a_valid_plan(plan_with, name, load, gpus, extra):
    plan = plan_with(name, load, gpus, extra)
    assert (plan.replicas_E(len(load)) >= 1).all()


@pytest.mark.parametrize("name", ONLINE)
def test_too_little_memory_is_one_sentence(plan_with, name):
    small = Budget(np.full(4, 1), np.full(4, 1e12), 4)
    with pytest.raises(UserError, match="memory is too small"):
        plan_with(name, [1.0] * 8, 4, budget=small)
    few_bytes = Budget(np.full(4, 4), np.full(4, 1.5 * EXPERT_BYTES), 4)
    with pytest.raises(UserError, match="memory is too small"):
        plan_with(name, [1.0] * 8, 4, budget=few_bytes)


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [-1.0, 1.0], [np.inf, 1.0]])
def test_a_forecast_that_is_no_load_is_one_sentence(bad):
    with pytest.raises(UserError, match="forecast"):
        Forecast(np.array(bad), np.zeros(2), 1, "test")


def test_unequal_slots_are_used(plan_with):
    budget = Budget(np.array([1, 2, 3, 6]), np.full(4, 1e12), 4)
    for name in ("eplb", "moeless"):
        plan = plan_with(name, [9.0, 1, 1, 1, 1, 1, 1, 1], 4, budget=budget, **(
            {"cv_threshold": 0.0} if name == "moeless" else {}
        ))  # fmt: skip
        assert plan.R == 12
        assert plan.slots_G(4).tolist() == [1, 2, 3, 6]


def test_params_are_read_from_text_and_refused_by_name():
    planner = PLANNERS.get("moeless")
    made = make_params(planner, parse_assignments(["cv_threshold=0.4", "count-idle=yes", "memory_cap_bytes=none"]))
    assert (made.cv_threshold, made.count_idle, made.memory_cap_bytes) == (0.4, True, None)
    with pytest.raises(UserError, match="there are: cv_threshold"):
        make_params(planner, {"threshold": "1"})
    with pytest.raises(UserError, match="must be a number"):
        make_params(planner, {"cv_threshold": "much"})
    with pytest.raises(UserError, match="name=value"):
        parse_assignments(["cv_threshold"])


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_expected_loads_spread_evenly_over_sources(load, sources):
    spread = spread_over_sources(np.array(load), sources)
    np.testing.assert_array_equal(spread.sum(0), load)
    assert np.ptp(spread.sum(1)) <= 1
