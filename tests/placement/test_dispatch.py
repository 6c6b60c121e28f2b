"""Equal shares: conservation per source rank, evenness in total, unusable copies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.contracts import LayerPlan
from moeless.errors import UserError
from moeless.placement.dealing import serving_R
from moeless.placement.dispatch import EVEN, DispatchRule
from tests.placement import reference
from tests.placement.conftest import make_setting


def random_plan(rng: np.random.Generator, experts: int, gpus: int, extra: int) -> LayerPlan:
    expert = np.concatenate([np.arange(experts), rng.integers(0, experts, extra)])
    primary = np.arange(len(expert)) < experts
    return LayerPlan.build(0, expert, rng.integers(0, gpus, len(expert)), primary, num_experts=experts, num_gpus=gpus)


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 6), st.integers(0, 12), st.sampled_from([1, 9, 300]))
@settings(max_examples=80, deadline=None)
def test_shares_are_equal_and_tokens_conserved(seed, experts, gpus, extra, most):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, experts, gpus, extra)
    load = rng.integers(0, most + 1, (gpus, experts))
    usable = rng.random(plan.R) < 0.7
    quota = EVEN(load, plan, usable, make_setting("static", experts, gpus))
    serving = serving_R(plan, usable, experts)
    np.testing.assert_array_equal(quota, reference.even_dispatch(load, plan.expert_R, serving))
    assert (quota[:, ~serving] == 0).all()
    for e in range(experts):
        copies = serving & (plan.expert_R == e)
        np.testing.assert_array_equal(quota[:, copies].sum(1), load[:, e])
        assert np.ptp(quota[:, copies].sum(0)) <= 1
        assert np.ptp(quota[:, copies], axis=1).max() <= 1


def test_an_expert_without_usable_copy_waits_for_its_primary():
    plan = LayerPlan.build(0, [0, 1, 0], [0, 1, 1], [True, True, False], num_experts=2, num_gpus=2)
    load = np.array([[3, 2], [1, 4]])
    quota = EVEN(load, plan, np.zeros(3, bool), make_setting("static", 2, 2))
    assert quota.sum(0)[plan.primary_R].tolist() == [4, 6]
    assert quota.sum() == 10


def test_marks_of_another_plan_are_refused():
    plan = LayerPlan.build(0, [0], [0], [True], num_experts=1, num_gpus=1)
    with pytest.raises(UserError, match="one per replica"):
        EVEN(np.ones((1, 1), int), plan, np.ones(2, bool), make_setting("static", 1, 1))


def test_a_rule_is_compiled_or_python_and_asked_only_where_something_is_left_to_decide():
    asked = []

    def quotas(load_SE, plan, usable_R, setting):
        asked.append(plan)
        return load_SE[:, plan.expert_R] * plan.primary_R

    rule, setting = DispatchRule(gathers_counts=True, quotas=quotas), make_setting("static", 2, 2)
    where = {"num_experts": 2, "num_gpus": 2}
    one_each = LayerPlan.build(0, [0, 1], [0, 1], [True, True], **where)
    copied = LayerPlan.build(0, [0, 1, 0], [0, 1, 1], [True, True, False], **where)
    fixed = LayerPlan.build(0, [0, 1, 0], [0, 1, 1], [True, True, False], share_R=[0.0, 1.0, 1.0], **where)
    load = np.array([[3, 2], [1, 4]])
    assert rule(load, one_each, np.ones(2, bool), setting).tolist() == load.tolist()
    # the plan's order: GPU by GPU, primaries first
    assert rule(load, fixed, np.ones(3, bool), setting).tolist() == [[0, 2, 3], [0, 4, 1]]
    assert not asked
    assert rule(load, copied, np.ones(3, bool), setting).tolist() == [[3, 2, 0], [1, 4, 0]]
    assert asked == [copied]
    for wrong in ({}, {"deal": EVEN.deal, "quotas": quotas}):
        with pytest.raises(UserError, match="deal or quotas"):
            DispatchRule(gathers_counts=True, **wrong)
