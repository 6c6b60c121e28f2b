"""Compiled pieces of the elastic planner against plain NumPy, and its dispatch against the ways it chooses from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.contracts import LayerPlan
from moeless.placement.dealing import quotas_of_totals, serving_R
from moeless.placement.dispatch import EVEN
from moeless.placement.dispatch_search import (
    GpuLoad,
    MovableCopies,
    Rates,
    least_load,
    search,
    search_memory,
    serve_whole,
)
from moeless.placement.elastic import DISPATCH, dispatch_numbers
from moeless.placement.extra_copies import BY_EXPERT, add_extra_copies
from moeless.placement.fastest_dispatch import choose_copies
from moeless.placement.layout import static_gpu_E
from moeless.placement.plan_scoring import score_static
from tests.placement import reference
from tests.placement.conftest import make_setting


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
    quota, serving = np.empty((gpus, plan.R), np.int64), np.ones(plan.R, np.bool_)
    quotas_of_totals(load, plan.expert_R, plan.gpu_R, plan.primary_R, serving, gpus, tokens, quota)
    np.testing.assert_array_equal(quota, reference.fill_sources(load, tokens, plan.expert_R, plan.gpu_R))


@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 6), st.integers(0, 8), st.sampled_from([3, 4000]))
@settings(max_examples=60, deadline=None)
def test_static_time_and_bound_are_those_of_plain_numpy(seed, experts, gpus, extra, most):
    load = np.random.default_rng(seed).integers(0, most, (4, experts))
    rates = Rates(1e-7, 1.6e-5, 4e-8)
    scored = score_static(load, static_gpu_E(experts, gpus), gpus, extra, rates)
    expected, least = reference.score_static(load, static_gpu_E(experts, gpus), gpus, extra, *rates)
    np.testing.assert_allclose(scored.static_seconds, expected, rtol=1e-9)
    np.testing.assert_allclose(scored.bound_C, least, rtol=1e-8)
    np.testing.assert_allclose(scored.rest_C, least[::-1].cumsum()[::-1], rtol=1e-8)


@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 6), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_hottest_first_copies_as_plain_numpy_does(seed, experts, gpus, slots):
    # whole numbers however often they are divided: no sum depends on the order of its terms
    weight = np.random.default_rng(seed).permutation(experts) * 60.0 + 60.0
    room = np.full(gpus, -(-experts // gpus) + slots)
    expert, gpu = np.empty(experts + slots * gpus, np.int32), np.empty(experts + slots * gpus, np.int32)
    gpu_E = static_gpu_E(experts, gpus)
    count = add_extra_copies(weight, gpu_E, room, slots * gpus, BY_EXPERT, expert, gpu)
    wanted_expert, wanted_gpu = reference.grow_by_expert(weight, gpu_E, room, slots * gpus)
    np.testing.assert_array_equal(expert[experts:count], wanted_expert)
    np.testing.assert_array_equal(gpu[experts:count], wanted_gpu)


@given(
    st.integers(0, 2**31),
    st.sampled_from([60, 3000, 40_000]),
    st.integers(1, 6),
    st.floats(0, 1),
    st.sampled_from(["roofline", "paper"]),
)
@settings(max_examples=40, deadline=None)
def test_dispatch_takes_what_the_cost_model_sees_end_first(seed, tokens, gpus, ready, costs):
    rng, plan = layer(seed, 12, gpus, 6)
    setting = make_setting("elastic", 12, gpus, costs=costs)
    load = rng.multinomial(tokens, rng.dirichlet(np.full(gpus * 12, 0.3))).reshape(gpus, 12)
    usable = rng.random(plan.R) < ready
    serving = serving_R(plan, usable, 12)
    # each expert's serving primary, or the first copy that serves
    homes = np.lexsort((np.arange(plan.R), ~plan.primary_R, ~serving))[::-1]
    home_E = np.zeros(12, np.int64)
    home_E[plan.expert_R[homes]] = homes
    searched = np.empty(plan.R, np.int64)
    a, b, c, depth, fuel = dispatch_numbers(setting)
    choose_copies(
        load.sum(0), plan.expert_R, plan.gpu_R, plan.primary_R, serving, gpus, a, b, c, int(depth), int(fuel), searched
    )
    static = np.zeros(plan.R, np.int64)
    static[home_E] = load.sum(0)
    ways = [np.empty((gpus, plan.R), np.int64) for _ in range(2)]
    for total, quota in zip((static, searched), ways, strict=True):
        quotas_of_totals(load, plan.expert_R, plan.gpu_R, plan.primary_R, usable, gpus, total, quota)
    if costs == "paper":
        ways.append(EVEN(load, plan, usable, setting))
    least = min(setting.costs.layer_seconds(quota, plan).total for quota in ways)
    mine = setting.costs.layer_seconds(DISPATCH(load, plan, usable, setting), plan).total
    np.testing.assert_allclose(mine, least, rtol=1e-12)


def movable(rng: np.random.Generator, gpus: int, experts: int, most: int) -> tuple[MovableCopies, np.ndarray]:
    """Copies of random experts on 2 to 4 GPUs each, sorted by GPU, all tokens on the first; and their experts."""
    pairs = sorted(
        (int(gpu), e)
        for e in range(experts)
        for gpu in rng.choice(gpus, int(rng.integers(2, min(4, gpus) + 1)), replace=False)
    )
    gpu_M, expert_M = (np.array(x, np.int64) for x in zip(*pairs, strict=True))
    tokens_M, next_M = np.zeros(len(pairs), np.int64), np.zeros(len(pairs), np.uint32)
    for e in range(experts):
        ring = np.flatnonzero(expert_M == e)
        next_M[ring] = np.roll(ring, -1)
        tokens_M[ring[0]] = rng.integers(1, most)
    first_G = np.searchsorted(gpu_M, np.arange(gpus + 1))
    return MovableCopies(tokens_M, gpu_M.astype(np.uint32), next_M, first_G), expert_M


@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(1, 60), st.sampled_from([4, 300, 9000]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_search_keeps_tokens_and_says_what_it_reached(seed, gpus, experts, most, thorough):
    rng = np.random.default_rng(seed)
    a, b, c = rates = Rates(7e-8, 1.6e-5, 4e-8)
    copies, expert_M = movable(rng, gpus, experts, most)
    gpu_M = copies.gpu_M.astype(np.int64)
    fixed_tokens_G = rng.integers(0, most, gpus)
    fixed_time_G = rng.random(gpus) * b * 4

    def totals(tokens_M: np.ndarray) -> GpuLoad:
        busy_M = np.where(tokens_M > 0, np.maximum(a * tokens_M, b), 0.0)
        tokens_G = fixed_tokens_G + np.bincount(gpu_M, tokens_M, gpus).astype(np.int64)
        return GpuLoad(fixed_time_G + np.bincount(gpu_M, busy_M, gpus), tokens_G)

    load_E = np.bincount(expert_M, copies.tokens_M, experts)
    load = totals(copies.tokens_M)
    before = load.seconds_G.max() + c * load.tokens_G.max()
    least = least_load(copies, load, rates, np.empty(gpus, np.int64))
    reached = search(copies, load, rates, 4, 400, thorough, search_memory(len(gpu_M) + 3, gpus))
    assert (copies.tokens_M >= 0).all()
    np.testing.assert_array_equal(np.bincount(expert_M, copies.tokens_M, experts), load_E)
    load = totals(copies.tokens_M)
    np.testing.assert_allclose(load.seconds_G.max() + c * load.tokens_G.max(), reached, rtol=1e-9)
    assert (least.seconds + c * least.tokens) * (1 - 1e-9) <= reached <= before * (1 + 1e-9)


@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(1, 80))
@settings(max_examples=40, deadline=None)
def test_experts_are_served_whole_the_largest_first(seed, gpus, experts):
    rng = np.random.default_rng(seed)
    # powers of two: sums are exact, so that ties are ties
    a, b, c = rates = Rates(2.0**-24, 2.0**-16, 2.0**-25)
    copies, expert_M = movable(rng, gpus, experts, 900)
    load_E = np.bincount(expert_M, copies.tokens_M, experts).astype(np.int64)
    holder_E = np.array([np.flatnonzero((expert_M == e) & (copies.tokens_M > 0))[0] for e in range(experts)])
    first_E = np.array([np.flatnonzero(expert_M == e)[0] for e in range(experts)])
    time_G, tokens_G = np.zeros(gpus), np.zeros(gpus, np.int64)
    np.add.at(time_G, copies.gpu_M[holder_E], np.maximum(a * load_E, b))
    np.add.at(tokens_G, copies.gpu_M[holder_E], load_E)
    serve_whole(copies, GpuLoad(time_G, tokens_G), rates, np.empty(len(expert_M), np.int64))
    # the same by plain Python: ties of size and of GPUs to the first copy
    busy_G, load_G, tokens_M = np.zeros(gpus), np.zeros(gpus, np.int64), np.zeros(len(expert_M), np.int64)
    for e in sorted(range(experts), key=lambda e: (-load_E[e], first_E[e])):
        ring = np.flatnonzero(expert_M == e)
        to = min(ring, key=lambda r: (busy_G[copies.gpu_M[r]] + c * load_G[copies.gpu_M[r]], r))
        tokens_M[to] = load_E[e]
        busy_G[copies.gpu_M[to]] += max(a * load_E[e], b)
        load_G[copies.gpu_M[to]] += load_E[e]
    np.testing.assert_array_equal(copies.tokens_M, tokens_M)
    np.testing.assert_array_equal(time_G, busy_G)
    np.testing.assert_array_equal(tokens_G, load_G)


def test_threads_dispatch_as_one_does():
    jobs = []
    for seed, (experts, gpus, extra) in enumerate([(32, 8, 8), (16, 4, 6), (32, 8, 16), (8, 2, 3)] * 3):
        rng, plan = layer(seed, experts, gpus, extra)
        load = rng.multinomial(9000, rng.dirichlet(np.full(experts, 0.4)), gpus)
        jobs.append((load, plan, np.ones(plan.R, np.bool_), make_setting("elastic", experts, gpus)))

    def run(job: tuple) -> np.ndarray:
        return DISPATCH(*job)

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, jobs * 40))
    for i, quota in enumerate(together):
        np.testing.assert_array_equal(quota, alone[i % len(jobs)])
