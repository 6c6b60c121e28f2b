"""Compiled pieces of the elastic planner against plain NumPy, and its one-call dispatch against the cost model."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.contracts import LayerPlan
from moeless.costs.roofline import RooflineCosts
from moeless.placement import reference
from moeless.placement.dispatch_kernels import fill_sources
from moeless.placement.elastic import ElasticParams, dispatch, dispatch_numbers
from moeless.placement.grow_kernels import BY_EXPERT, grow
from moeless.placement.judge_kernels import static_and_bound
from moeless.placement.layout import static_gpu_E
from tests.placement.conftest import make_cluster, make_spec


class OpaqueCosts(RooflineCosts):
    """The same times, known through ``layer_seconds`` alone."""

    def kernel_terms(self):
        return None


def layer(seed: int, experts: int, gpus: int, extra: int) -> tuple[np.random.Generator, LayerPlan]:
    rng = np.random.default_rng(seed)
    expert = np.concatenate([np.arange(experts), rng.integers(0, experts, extra)])
    gpu = np.concatenate([static_gpu_E(experts, gpus), rng.integers(0, gpus, extra)])
    primary = np.arange(len(expert)) < experts
    return rng, LayerPlan.build(0, expert, gpu, primary, num_experts=experts, num_gpus=gpus)


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 6), st.integers(0, 8), st.sampled_from([3, 400]))
@settings(max_examples=60, deadline=None)
def test_sources_are_filled_as_plain_numpy_does(seed, experts, gpus, extra, most):
    rng, plan = layer(seed, experts, gpus, extra)
    load = rng.integers(0, most, (gpus, experts))
    tokens = np.zeros(plan.R, np.int64)
    for e in range(experts):
        copies = np.flatnonzero(plan.expert_R == e)
        tokens[copies] = rng.multinomial(load[:, e].sum(), np.full(len(copies), 1 / len(copies)))
    quota = np.empty((gpus, plan.R), np.int64)
    fill_sources(load, tokens, plan.expert_R, plan.gpu_R, quota)
    np.testing.assert_array_equal(quota, reference.fill_sources(load, tokens, plan.expert_R, plan.gpu_R))


@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 6), st.integers(0, 8), st.sampled_from([3, 4000]))
@settings(max_examples=60, deadline=None)
def test_static_time_and_bound_are_those_of_plain_numpy(seed, experts, gpus, extra, most):
    load = np.random.default_rng(seed).integers(0, most, (4, experts))
    numbers, bound = (1e-7, 1.6e-5, 4e-8), np.empty(4)
    static = static_and_bound(load, static_gpu_E(experts, gpus), gpus, extra, *numbers, bound)
    expected, least = reference.static_and_bound(load, static_gpu_E(experts, gpus), gpus, extra, *numbers)
    np.testing.assert_allclose(static, expected, rtol=1e-9)
    np.testing.assert_allclose(bound, least, rtol=1e-8)


@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 6), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_hottest_first_copies_as_plain_numpy_does(seed, experts, gpus, slots):
    # whole numbers however often they are divided: no sum depends on the order of its terms
    weight = np.random.default_rng(seed).permutation(experts) * 60.0 + 60.0
    room = np.full(gpus, -(-experts // gpus) + slots)
    expert, gpu = np.empty(experts + slots * gpus, np.int32), np.empty(experts + slots * gpus, np.int32)
    gpu_E = static_gpu_E(experts, gpus)
    count = grow(weight, gpu_E, room, slots * gpus, BY_EXPERT, expert, gpu)
    wanted_expert, wanted_gpu = reference.grow_by_expert(weight, gpu_E, room, slots * gpus)
    np.testing.assert_array_equal(expert[experts:count], wanted_expert)
    np.testing.assert_array_equal(gpu[experts:count], wanted_gpu)


@given(st.integers(0, 2**31), st.sampled_from([60, 3000, 40_000]), st.integers(1, 6), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_one_call_chooses_as_the_cost_model_would(seed, tokens, gpus, ready):
    rng, plan = layer(seed, 12, gpus, 6)
    spec, machine = make_spec(12), make_cluster(gpus)
    load = rng.multinomial(tokens, rng.dirichlet(np.full(gpus * 12, 0.3))).reshape(gpus, 12)
    usable = rng.random(plan.R) < ready
    quotas = []
    for costs in (RooflineCosts(spec, machine), OpaqueCosts(spec, machine)):
        shared = {"spec": spec, "cluster": machine, "costs": costs, "params": ElasticParams()}
        quotas.append(dispatch(load, plan, usable, **shared))
    assert dispatch_numbers(costs) is None
    seconds = [costs.layer_seconds(quota, plan).total for quota in quotas]
    np.testing.assert_allclose(seconds[0], seconds[1], rtol=1e-12)
