"""The paper's Algorithms 1 and 2: stopping rule, warm start, and every choice the paper leaves open."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.contracts import InstanceState, LayerPlan
from moeless.errors import UserError
from moeless.placement.paper import PaperParams, PaperTerms, place_replicas, plan_copies, scale_experts
from tests.placement import reference

loads = st.lists(st.integers(0, 1000), min_size=1, max_size=32).map(lambda xs: np.array(xs, float))


def cv(load_E, count_E):
    replicas = np.repeat(load_E / count_E, count_E)
    return replicas.std() / replicas.mean()


def test_scaling_stops_as_soon_as_replicas_are_even_enough():
    load = np.array([400.0, 100, 100, 100])
    count = scale_experts(load, 10, 0.2)
    assert count.tolist() == [3, 1, 1, 1]
    assert cv(load, count) <= 0.2 < cv(load, np.array([2, 1, 1, 1]))


def test_the_cap_bounds_extra_replicas():
    assert scale_experts(np.array([1000.0, 1, 1, 1]), 2, 0.0).tolist() == [3, 1, 1, 1]


def test_idle_experts_scale_to_the_cap_only_where_they_count():
    load = np.array([50.0, 50, 50, 0])
    assert scale_experts(load, 8, 0.2).sum() == 4
    assert scale_experts(load, 8, 0.2, count_idle=True).sum() == 12


@given(loads, st.integers(0, 40), st.sampled_from([0.0, 0.2, 0.7]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_scaling_kernel_equals_numpy(load_E, extra, threshold, idle):
    mine = scale_experts(load_E, extra, threshold, idle)
    plain = reference.scale_experts(load_E, extra, threshold, idle)
    if (mine != plain).any():  # a coefficient of variation on the threshold itself may round either way
        fewer = np.minimum(mine, plain)
        kept = load_E > 0 if not idle else np.ones(len(load_E), bool)
        assert cv(load_E[kept], fewer[kept]) == pytest.approx(threshold, abs=1e-6)


@given(loads, st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_placement_kernel_equals_numpy(load_P, gpus, seed):
    rng = np.random.default_rng(seed)
    load_P = np.sort(load_P)[::-1]
    expert_P = rng.integers(0, 8, len(load_P))
    room = np.full(gpus, -(-len(load_P) // gpus) + 1)
    alive = rng.integers(0, 2, (8, gpus))
    np.testing.assert_array_equal(
        place_replicas(load_P, expert_P, room, alive.copy()), reference.place_replicas(load_P, expert_P, room, alive)
    )


def test_replicas_join_the_least_loaded_gpu(plan_with):
    plan = plan_with("moeless", [8, 7, 6, 5], 2, 0)
    assert {(int(e), int(g)) for e, g in zip(plan.expert_R, plan.gpu_R, strict=True)} == {
        (0, 0),
        (1, 1),
        (2, 1),
        (3, 0),
    }


def test_a_live_replica_stays_where_it_is(plan_with):
    first = plan_with("moeless", [8, 7, 6, 5], 2, 0)
    again = plan_with("moeless", [5, 6, 7, 8], 2, 0, previous=first)
    assert (again.expert_R == first.expert_R).all()
    assert (again.gpu_R == first.gpu_R).all()


def test_an_expired_replica_is_placed_anew(plan_with):
    first = plan_with("moeless", [8, 7, 6, 5], 2, 0)
    gone = np.full(4, InstanceState.EXPIRED, np.uint8)
    anew = plan_with("moeless", [5, 6, 7, 8], 2, 0, previous=first, state_R=gone)
    assert anew.to_json() == plan_with("moeless", [5, 6, 7, 8], 2, 0).to_json()


def test_memory_cap_and_overshoot(plan_with):
    load = [900.0, 10, 10, 10, 10, 10, 10, 10]
    size = 3 * 2880 * 2880 * 2
    assert plan_with("moeless", load, 8, 1, memory_cap_bytes=2.5 * size).num_extra == 2
    assert plan_with("moeless", load, 8, 1, memory_cap_bytes=2.5 * size, overshoot=True).num_extra == 3


def test_full_gpus_are_skipped_unless_the_check_is_off(plan_with):
    load = [100.0, 1, 1, 1, 1, 1]
    plan = plan_with("moeless", load, 2, 0)
    assert plan.slots_G(2).tolist() == [3, 3]
    free = plan_with("moeless", load, 2, 0, memory_check=False)
    assert sorted(free.slots_G(2).tolist()) == [1, 5]


@pytest.mark.parametrize("values", [{"cv_threshold": -1}, {"cv_threshold": float("nan")}, {"memory_cap_bytes": -1}])
def test_bad_parameters_are_one_sentence(values):
    with pytest.raises(UserError, match="at least 0"):
        PaperParams(**values)


def test_plan_has_one_primary_per_expert(plan_with):
    plan = plan_with("moeless", np.arange(12.0), 4, 2)
    assert isinstance(plan, LayerPlan)
    assert np.bincount(plan.expert_R[plan.primary_R], minlength=12).tolist() == [1] * 12


@given(loads, st.integers(1, 9), st.integers(0, 20), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_compiled_plans_equal_both_algorithms_in_numpy(load_E, gpus, extra, check, seed):
    experts = len(load_E)
    room = np.full(gpus, -(-(experts + extra) // gpus))
    alive_EG = np.random.default_rng(seed).integers(0, 2, (experts, gpus))
    size = experts + extra
    expert_R, gpu_R, primary_R = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.bool_)
    terms = PaperTerms(extra, 0.2, False, check, room)
    count = plan_copies(load_E, terms, alive_EG.copy(), expert_R, gpu_R, primary_R)
    # scaling has a test of its own
    count_E = scale_experts(load_E, extra, 0.2)
    expert_P = np.repeat(np.arange(experts), count_E)
    load_P = load_E[expert_P] / count_E[expert_P]
    order = np.argsort(-load_P, kind="stable")
    expert_P, load_P = expert_P[order], load_P[order]
    gpu_P = reference.place_replicas(load_P, expert_P, room if check else np.full(gpus, count), alive_EG)
    first_P = np.array([e not in expert_P[:p] for p, e in enumerate(expert_P)])
    plain = LayerPlan.build(0, expert_P, gpu_P, first_P, num_experts=experts, num_gpus=gpus)
    np.testing.assert_array_equal(expert_R[:count], plain.expert_R)
    np.testing.assert_array_equal(gpu_R[:count], plain.gpu_R)
    np.testing.assert_array_equal(primary_R[:count], plain.primary_R)
