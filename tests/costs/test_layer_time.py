"""A layer's time: its parts add up, it is what plain NumPy makes of it, and more tokens never take less of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import CPU, Cluster, cluster
from moeless.contracts import LayerPlan
from moeless.costs import COSTS, CostModel
from moeless.costs.layer_time import (
    COMBINE,
    ENGINE_EXPERT,
    EVEN_OR_FAST,
    HOT_OR_SLOW,
    NUM_TRAFFIC,
    PERMUTE,
    LayerTime,
    add_rows,
    curve_at,
    layer_parts,
    quota_seconds,
    total_seconds,
    traffic_seconds,
)
from moeless.costs.measured import MeasuredCosts
from moeless.costs.profile_reader import load_profile, shipped_profiles
from moeless.spec import MoESpec, preset

SPEC = preset("gpt-oss-20b")
#: One GPU; one island; islands of two, the last of one; nodes of eight; a link tier for each GPU.
CLUSTERS = (
    cluster("h100x1"),
    cluster("h100x8"),
    cluster("a6000x8"),
    cluster("a6000x7"),
    cluster("h100x8x2"),
    cluster("h100x1x4"),
    cluster("cpu2"),
)
EXPERTS = 6
clusters, seeds, most_tokens = st.sampled_from(CLUSTERS), st.integers(0, 2**31), st.sampled_from([1, 40, 3000])


def layer(seed: int, gpus: int, most: int) -> tuple[np.random.Generator, np.ndarray, LayerPlan]:
    """Tokens of each source to each copy, some copies without any, and the plan."""
    rng = np.random.default_rng(seed)
    expert = np.concatenate([np.arange(EXPERTS), rng.integers(0, EXPERTS, 5)])
    gpu, primary = rng.integers(0, gpus, len(expert)), np.arange(len(expert)) < EXPERTS
    plan = LayerPlan.build(0, expert, gpu, primary, num_experts=EXPERTS, num_gpus=gpus)
    quota = rng.integers(0, most + 1, (gpus, plan.R)) * (rng.random((gpus, plan.R)) < rng.random())
    return rng, quota * (rng.random(plan.R) < 0.8), plan


def paper_by_numpy(quota_SR: np.ndarray, gpu_R: np.ndarray, spec: MoESpec, where: Cluster) -> tuple[float, float]:
    """The slowest replica, and the fullest GPU's tokens over the slowest link, there and back."""
    link = where.slow if where.num_gpus > where.island_size else where.fast
    tokens_R = quota_SR.sum(0)
    fullest = np.bincount(gpu_R, tokens_R, where.num_gpus).max()
    expert = tokens_R.max() * spec.expert_flops / where.device.flops
    return float(expert), float(2 * fullest * spec.token_bytes / link.bandwidth)


def roofline_by_numpy(quota_SR: np.ndarray, gpu_R: np.ndarray, spec: MoESpec, where: Cluster) -> tuple[float, float]:
    """The slowest GPU's used replicas one after the other and a launch; the slower link tier, there and back."""
    gpus, device = where.num_gpus, where.device
    tokens_R = quota_SR.sum(0)
    busy_R = np.maximum(tokens_R * spec.expert_flops / device.flops, spec.expert_bytes / device.memory_bandwidth)
    used_R = tokens_R > 0
    expert_G = np.bincount(gpu_R[used_R], busy_R[used_R], gpus)
    expert = (expert_G + device.launch_seconds * (expert_G > 0)).max()
    if gpus == 1:
        return float(expert), 0.0
    tokens_SG = quota_SR @ np.eye(gpus, dtype=np.int64)[gpu_R]
    island_G = np.arange(gpus) // where.island_size
    near_SG = island_G[:, None] == island_G[None]
    times = []
    for link, pairs_SG, there in (
        (where.fast, near_SG & ~np.eye(gpus, dtype=bool), where.island_size > 1),
        (where.slow, ~near_SG, gpus > where.island_size),
    ):
        moved_SG = tokens_SG * pairs_SG
        fullest = max(moved_SG.sum(0).max(), moved_SG.sum(1).max())
        times += [link.latency + fullest * spec.token_bytes / link.bandwidth] if there else []
    return float(expert), float(2 * max(times))


BY_NUMPY = {"paper": paper_by_numpy, "roofline": roofline_by_numpy}


@pytest.mark.parametrize("name", BY_NUMPY)
@given(where=clusters, seed=seeds, most=most_tokens)
@settings(max_examples=80, deadline=None)
def test_a_layer_takes_what_plain_numpy_makes_of_it(name, where, seed, most):
    _, quota, plan = layer(seed, where.num_gpus, most)
    costs = COSTS.get(name)(SPEC, where)
    expected = BY_NUMPY[name](quota, plan.gpu_R, SPEC, where)
    traffic = np.empty((NUM_TRAFFIC, where.num_gpus))
    expert, exchange, active = quota_seconds(quota, plan.gpu_R, costs.layer_costs, traffic)
    np.testing.assert_allclose((expert, exchange), expected, rtol=1e-12)
    assert active == (quota.sum(0) > 0).sum()
    time = costs.layer_seconds(quota, plan, control=3e-6)
    np.testing.assert_allclose(time, (*expected, 0.0, 3e-6, 0.0), rtol=1e-12)
    # the parts that a cost model answers by themselves are those of the layer
    assert costs.expert_seconds(quota.sum(0), plan).max() == expert
    bytes_SG = quota @ np.eye(where.num_gpus)[plan.gpu_R] * SPEC.token_bytes
    np.testing.assert_allclose(costs.all_to_all_seconds(bytes_SG), exchange, rtol=1e-12)


times = st.floats(0, 1)


@given(times, times, times, times, times)
def test_the_parts_add_up_to_the_layers_time(expert, exchange, misc, control, stall):
    costs = COSTS.get("paper")(SPEC, CLUSTERS[1], misc=misc).layer_costs
    time = layer_parts(expert, exchange, control, stall, costs)
    # compiled or not: the same
    assert tuple(time) == (expert, exchange, misc, control, stall)
    assert LayerTime(*time).total == total_seconds(time) == pytest.approx(sum(time), rel=1e-12)


@given(clusters, seeds, most_tokens)
@settings(max_examples=40, deadline=None)
def test_rows_of_a_pair_count_as_one_and_their_order_does_not_matter(where, seed, most):
    rng, quota, plan = layer(seed, where.num_gpus, most)
    costs, gpus = COSTS.get("roofline")(SPEC, where).layer_costs, where.num_gpus
    traffic, tokens = np.empty((2, NUM_TRAFFIC, gpus)), np.full(plan.R, -1)
    *whole, active = quota_seconds(quota, plan.gpu_R, costs, traffic[0])
    source, copy = np.nonzero(quota)
    # each pair's tokens in two rows, one of them maybe of none, all mixed
    part = rng.integers(0, quota[source, copy] + 1)
    rows = np.stack([np.tile(source, 2), np.tile(copy, 2), np.concatenate([part, quota[source, copy] - part])])
    rows = rows[:, rng.permutation(rows.shape[1])]
    rows = np.ascontiguousarray(rows[:, rows[2] > 0])
    assert add_rows(*rows, rows.shape[1], plan.gpu_R, costs.island_G, tokens, traffic[1]) == active
    np.testing.assert_array_equal(tokens, quota.sum(0))
    np.testing.assert_array_equal(traffic[0], traffic[1])
    np.testing.assert_array_equal(
        traffic_seconds(tokens, plan.gpu_R, traffic[1], costs, np.empty(gpus), np.empty(200, np.int64)), whole
    )


@pytest.mark.parametrize("name", BY_NUMPY)
@given(where=clusters, seed=seeds, most=most_tokens, added=st.integers(1, 5000))
@settings(max_examples=60, deadline=None)
def test_more_tokens_never_take_less_time(name, where, seed, most, added):
    rng, quota, plan = layer(seed, where.num_gpus, most)
    costs: CostModel = COSTS.get(name)(SPEC, where)
    more = quota.copy()
    more[rng.integers(where.num_gpus), rng.integers(plan.R)] += added
    for before, after in zip(costs.layer_seconds(quota, plan), costs.layer_seconds(more, plan), strict=True):
        assert before <= after * (1 + 1e-12)


@pytest.fixture(scope="module", params=shipped_profiles())
def shipped(request) -> MeasuredCosts:
    """A shipped profile's times, on as many ranks as it was measured among."""
    profile = load_profile(request.param)
    model = profile.document["model"]
    ranks = profile.exchange[0].ranks if profile.exchange else 2
    cpu = profile.document["machine"]["device"] == "cpu"
    where = cluster("cpu8" if cpu else "h100x8").with_gpus(ranks)
    assert (where.device.name == CPU.name) == cpu
    return MeasuredCosts(preset(model["name"]), where, profile=profile)


def test_measured_experts_take_the_profiles_time_at_its_points(shipped):
    grid, tables, gpus = shipped.grid, shipped.layer_costs.tables, shipped.cluster.num_gpus
    for active, row in zip(grid.active_A.astype(int), grid.seconds_AN, strict=True):
        if active > shipped.spec.E:
            continue
        plan = LayerPlan.build(
            0, np.arange(active), np.zeros(active), np.ones(active, bool), num_experts=active, num_gpus=gpus
        )
        for tokens, seconds in zip(grid.tokens_N.astype(int), row, strict=True):
            # what is measured by a GPU's tokens comes on top
            around = sum(curve_at(curve, float(active * tokens), tables) for curve in (PERMUTE, COMBINE))
            around += curve_at(ENGINE_EXPERT, active * tokens / shipped.spec.K, tables)
            got = shipped.expert_seconds(np.full(active, tokens), plan)
            np.testing.assert_allclose(got, [seconds + around] + [0.0] * (gpus - 1), rtol=1e-9)
    assert not [warning for warning in shipped.warnings if "extrapolated" in warning]


def test_measured_curves_take_the_profiles_time_at_its_points(shipped):
    tables, parts = shipped.layer_costs.tables, shipped.profile.parts
    measured = {PERMUTE: parts["permute"], COMBINE: parts["combine"]}
    if shipped.exchange.measured is not None:
        measured |= {EVEN_OR_FAST: shipped.exchange.measured.uniform, HOT_OR_SLOW: shipped.exchange.measured.hot}
    for curve, points in measured.items():
        got = [curve_at(curve, x, tables) for x in points.x]
        np.testing.assert_allclose(got, points.seconds, rtol=1e-12)
        # and between them and beyond what the profile itself reads
        for x in (points.x[0] / 2, points.x[:2].mean(), points.x[-1] * 3):
            assert curve_at(curve, x, tables) == pytest.approx(points.at(x), rel=1e-12)


@given(seeds, most_tokens, st.integers(1, 500))
@settings(max_examples=40, deadline=None)
def test_more_tokens_never_take_measured_experts_less_time(shipped, seed, most, added):
    gpus = shipped.cluster.num_gpus
    rng, quota, plan = layer(seed, gpus, most)
    more = quota.copy()
    more[rng.integers(gpus), rng.integers(plan.R)] += added
    before, after = (shipped.layer_seconds(table, plan).expert for table in (quota, more))
    assert before <= after * (1 + 1e-12)
