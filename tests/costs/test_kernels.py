import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import LayerPlan
from moeless.costs import COSTS, kernels
from moeless.spec import preset

CLUSTERS = [cluster("h100x8"), cluster("a6000x8"), cluster("h100x4x3"), cluster("h100x8").with_gpus(1), cluster("cpu2")]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(CLUSTERS), st.sampled_from(["paper", "roofline"]), st.integers(0, 2**32 - 1), st.integers(0, 12))
def test_compiled_layer_time_is_layer_seconds(where, name, seed, extras):
    spec = preset("mixtral-8x7b")
    costs = COSTS.get(name)(spec, where)
    random = np.random.default_rng(seed)
    expert = np.concatenate([np.arange(spec.E), random.integers(0, spec.E, extras)])
    gpu = random.integers(0, where.G, len(expert))
    primary = np.arange(len(expert)) < spec.E
    plan = LayerPlan.build(0, expert, gpu, primary, num_experts=spec.E, num_gpus=where.G)
    quota_SR = random.integers(0, 50, (where.G, plan.R)) * (random.random((where.G, plan.R)) < 0.3)
    time = costs.layer_seconds(quota_SR, plan)
    load_G = np.zeros(where.G)
    got = kernels.quota_time(quota_SR, plan.gpu_R, costs.kernel_terms(), where.G, load_G)
    assert got == pytest.approx((time.expert, time.all_to_all), rel=1e-12)
    assert (load_G == np.bincount(plan.gpu_R, weights=quota_SR.sum(0), minlength=where.G)).all()
