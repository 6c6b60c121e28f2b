"""Equal shares: conservation per source rank, evenness in total, unusable copies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import LayerPlan
from moeless.errors import UserError
from moeless.placement.dispatch import even_dispatch, serving_R
from moeless.spec import preset
from tests.placement import reference


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
    quota = even_dispatch(load, plan, usable, spec=preset("bundled"), cluster=cluster("h100x8"))
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
    quota = even_dispatch(load, plan, np.zeros(3, bool), spec=preset("bundled"), cluster=cluster("h100x8"))
    assert quota.sum(0)[plan.primary_R].tolist() == [4, 6]
    assert quota.sum() == 10


def test_marks_of_another_plan_are_refused():
    plan = LayerPlan.build(0, [0], [0], [True], num_experts=1, num_gpus=1)
    with pytest.raises(UserError, match="one per replica"):
        even_dispatch(np.ones((1, 1), int), plan, np.ones(2, bool), spec=preset("bundled"), cluster=cluster("h100x8"))
