"""Elastic: never slower than static EP, primaries stay, skip, economy, stability; the chains against the exact one."""

from __future__ import annotations

import multiprocessing
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import Budget, Forecast, LayerPlan, Phase, PlanInput
from moeless.costs import COSTS
from moeless.errors import UserError
from moeless.placement.dispatch_search import Rates
from moeless.placement.elastic import PLANNER, ElasticParams, choice_terms, scenario_deviates_CE
from moeless.placement.elastic_placement import sort_plan
from moeless.placement.exact import exact_dispatch, terms_seconds
from moeless.placement.fastest_dispatch import choose_copies, expected_seconds
from moeless.placement.layout import static_gpu_E
from moeless.placement.plan_scoring import MOST_FEW, draw_few_tokens, draw_scenarios, score_static
from moeless.placement.setting import Setting
from moeless.placement.static import static_plan
from moeless.spec import preset

SPEC = preset("gpt-oss-20b").with_expert_dtype("bfloat16")
H100 = cluster("h100x8")


def setting(gpus: int = 8, extra: int = 1, costs: str = "roofline", **params) -> Setting:
    machine = H100.with_gpus(gpus)
    room = Budget.even(SPEC.E, gpus, extra, SPEC.expert_bytes)
    return Setting(SPEC, machine, COSTS.get(costs)(SPEC, machine), room, ElasticParams(**params))


def plan_for(mean, gpus=8, extra=1, previous=None, costs="roofline", times=(0, 0.0, None), **params) -> LayerPlan:
    mean = np.asarray(mean, float)
    x = PlanInput(0, Phase.PREFILL, Forecast(mean, mean, 1, "test"), previous, None, *times)
    return PLANNER.plan(x, setting(gpus, extra, costs, **params))


def skewed(seed: int, tokens: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.multinomial(tokens, rng.dirichlet(np.full(32, 0.5)))


@given(
    st.integers(0, 2**31),
    st.sampled_from([40, 1000, 20_000]),
    st.integers(1, 9),
    st.sampled_from(["roofline", "paper"]),
    st.integers(0, 2),
    st.floats(0, 1),
)
@settings(max_examples=80, deadline=None)
def test_dispatch_is_never_slower_than_static_whatever_the_forecast(seed, tokens, gpus, costs, extra, ready):
    rng = np.random.default_rng(seed)
    plan = plan_for(rng.random(32) * 100, gpus, extra, costs=costs, skip=False, scenarios=2)
    where = setting(gpus, extra, costs)
    load = rng.multinomial(tokens, rng.dirichlet(np.full(gpus * 32, 0.2))).reshape(gpus, 32)
    usable = plan.primary_R | (rng.random(plan.R) < ready)
    quota = PLANNER.dispatch(load, plan, usable, where)
    for e in range(32):
        np.testing.assert_array_equal(quota[:, plan.expert_R == e].sum(1), load[:, e])
    assert (quota[:, ~usable] == 0).all()
    static = static_plan(0, 32, gpus)
    slow = where.costs.layer_seconds(load[:, static.expert_R], static).total
    assert where.costs.layer_seconds(quota, plan).total <= slow * (1 + 1e-12)


def test_primaries_never_leave_their_static_gpus():
    plan = plan_for(skewed(0, 60_000), extra=2)
    assert plan.num_extra > 0
    assert (plan.gpu_R[plan.primary_R] == static_gpu_E(32, 8)[plan.expert_R[plan.primary_R]]).all()


def test_large_skewed_batches_come_close_to_the_bound():
    load = skewed(1, 60_000)
    plan = plan_for(load, extra=2)
    # every rank owns an eighth of the tokens
    load_SE = np.stack([load // 8] * 8)
    quota = PLANNER.dispatch(load_SE, plan, np.ones(plan.R, bool), setting())
    tokens_G = np.bincount(plan.gpu_R, weights=quota.sum(0), minlength=8)
    static_G = np.bincount(static_gpu_E(32, 8), weights=load_SE.sum(0), minlength=8)
    assert tokens_G.max() / tokens_G.mean() < 1.1 < static_G.max() / static_G.mean()


@pytest.mark.parametrize("extra", [1, 2])
@pytest.mark.parametrize("tokens", [128, 4096, 16_384])
def test_chains_come_close_to_the_exact_dispatch(tokens, extra):
    terms, saved, possible, static = setting().costs.terms(), 0.0, 0.0, 0.0
    for seed in range(8):
        load = skewed(seed, tokens)
        plan = plan_for(load * 0.8 + tokens / 160, extra=extra, scenarios=0, skip=False)
        exact = exact_dispatch(load, plan, np.ones(plan.R, bool), terms, 8, time_limit=10)
        got = np.zeros(plan.R, np.int64)
        before, after = choose_copies(
            load, plan.expert_R, plan.gpu_R, plan.primary_R, np.ones(plan.R, bool), 8,
            terms.token_seconds, terms.floor_seconds, 2 * terms.link_seconds, 3, 4000, got,
        )  # fmt: skip
        seconds = terms_seconds(got, plan.gpu_R, terms, 8)
        fixed = terms.launch_seconds + 2 * terms.latency_seconds
        assert seconds == pytest.approx(after + fixed, rel=1e-9)
        assert seconds >= exact.lower_bound * (1 - 1e-6)
        saved += before - after
        possible += before + fixed - exact.seconds
        static += before
    assert saved >= possible - 0.02 * static
    assert saved > 0 or possible < 0.02 * static


def test_dispatch_is_skipped_where_it_cannot_pay_for_its_control_time():
    light = np.full(32, 4.0)
    assert plan_for(light, extra=2).num_extra == 0
    heavy = skewed(2, 60_000)
    assert plan_for(heavy, extra=2).num_extra > 0


def test_no_extras_where_nothing_can_be_gained():
    assert plan_for(np.full(32, 5000.0), extra=2, economy=0.2, doubt=0.0).num_extra == 0


def test_economy_holds_fewer_extras():
    load = skewed(3, 60_000)
    assert plan_for(load, extra=2, economy=0.2).num_extra < plan_for(load, extra=2, economy=0.0).num_extra


def test_a_plan_stays_unless_the_gain_pays_for_the_transfers():
    load = skewed(4, 20_000)
    first = plan_for(load, extra=1)
    nearly = load * np.random.default_rng(0).uniform(0.97, 1.03, 32)
    assert plan_for(nearly, extra=1, previous=first, patience_iterations=1).to_json() == first.to_json()
    other = skewed(5, 20_000)
    moved = plan_for(other, extra=1, previous=first, times=(1_000_000, 0.0, None))
    assert moved.to_json() != first.to_json()
    # without a stated horizon the planner's patience decides
    assert plan_for(other, extra=1, previous=first, patience_iterations=10**6).to_json() == moved.to_json()


def test_a_forecast_of_one_iteration_moves_only_what_arrives_in_time_or_pays_at_once():
    first, copy = plan_for(skewed(4, 20_000), extra=1, skip=False), 1e-3

    def planned(*times):
        return plan_for(skewed(5, 20_000), extra=1, previous=first, times=times, skip=False).to_json()

    assert planned(1, 0.0, copy) == first.to_json()
    assert planned(1, 2 * copy, copy) == plan_for(skewed(5, 20_000), extra=1, skip=False).to_json() != first.to_json()
    # a link so fast that the wait is less than what the change saves in this very iteration
    assert planned(1, 0.0, 1e-9) == planned(1, 2 * copy, copy)


def drawn(mean: float, var: float, doubt: float) -> np.ndarray:
    load_CE = np.zeros((8, 32), np.int64)
    rows = draw_scenarios(np.full(32, mean), np.full(32, var), doubt, scenario_deviates_CE(0, 8, 32), load_CE)
    return load_CE[:rows]


def test_scenarios_repeat_and_keep_the_mean():
    loads = drawn(1000, 2500, 0.0)
    np.testing.assert_array_equal(loads, drawn(1000, 2500, 0.0))
    assert abs(loads.mean() - 1000) < 1
    assert 25 < loads.std() < 75


def test_a_forecast_is_doubted_unless_it_claims_to_be_exact():
    assert 250 < drawn(1000, 1000, 0.5).std() < 750
    assert drawn(1000, 0, 0.5).tolist() == [[1000] * 32]


@pytest.mark.parametrize(("mean", "spread"), [(0.1, 0.0), (4.0, 0.0), (4.0, 0.8), (12.0, 0.5)])
def test_few_tokens_are_counted_with_the_mean_and_spread_asked_for(mean, spread):
    var = max(mean, (spread * mean) ** 2)
    normals = NormalDist()
    counts = np.empty(4000, np.int64)
    draw_few_tokens(
        mean, var, np.array([normals.inv_cdf((i + 0.5) / 4000) for i in range(4000)]), counts, np.empty(MOST_FEW)
    )
    assert counts.min() == 0
    assert counts.mean() == pytest.approx(mean, rel=0.02)
    assert counts.var() == pytest.approx(var, rel=0.05)
    if spread == 0.0:
        assert (counts == 0).mean() == pytest.approx(np.exp(-mean), abs=1e-3)


def test_more_caution_skips_layers_whose_saving_is_in_doubt():
    kept = [
        [plan_for(skewed(seed, 2000), skip_caution=caution).num_extra > 0 for seed in range(20)]
        for caution in (0.0, 1.0, 50.0)
    ]
    assert sum(kept[0]) > sum(kept[2])
    for less, more in pairwise(kept):
        assert all(a or not b for a, b in zip(less, more, strict=True))


@pytest.mark.parametrize("previous", [False, True])
def test_planning_all_layers_at_once_gives_the_plans_of_one_by_one(previous):
    where, before = setting(extra=2), [None] * 100
    for round_ in range(1 + previous):
        inputs = [
            PlanInput(i % SPEC.L, Phase(round_), Forecast(load, load, 4000, "test"), before[i], None, 100)
            for i, load in enumerate(skewed(50 * round_ + i, 400 * (1 + i)).astype(float) for i in range(100))
        ]
        together = PLANNER.plan_all(inputs, where)
        for x, plan in zip(inputs, together, strict=True):
            plan.validate(num_experts=32, num_gpus=8)
            assert plan.to_json() == PLANNER.plan(x, where).to_json()
        before = together
    assert sum(plan.num_extra for plan in together) > 100


def test_a_forked_process_plans_all_layers_too():
    inputs = [
        PlanInput(i % SPEC.L, Phase.PREFILL, Forecast(load, load, 4000, "test"))
        for i, load in enumerate(skewed(i, 30_000).astype(float) for i in range(100))
    ]
    here = [plan.to_json() for plan in PLANNER.plan_all(inputs, setting())]
    reader, writer = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        writer.send([plan.to_json() for plan in PLANNER.plan_all(inputs, setting())])

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert reader.poll(60)
    assert reader.recv() == here
    process.join()


def test_hundreds_of_gpus_are_searched_as_far_as_a_few():
    where = setting(256)
    load = np.random.default_rng(0).multinomial(500_000, np.full(32, 1 / 32)).astype(float)
    plan = PLANNER.plan(PlanInput(0, Phase.PREFILL, Forecast(load, load, 1, "test")), where)
    load_SE = np.stack([load // 256] * 256).astype(np.int64)
    quota = PLANNER.dispatch(load_SE, plan, np.ones(plan.R, bool), where)
    tokens_G = np.bincount(plan.gpu_R, weights=quota.sum(0), minlength=256)
    # static EP has 32 GPUs at work
    assert tokens_G.max() < 0.3 * load_SE.sum() / 32


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(0, 20))
def test_replicas_come_in_a_plan_s_order(seed, gpus, extra):
    rng = np.random.default_rng(seed)
    terms = choice_terms(setting(gpus, extra=3))
    expert = np.concatenate([np.arange(32), rng.integers(0, 32, extra)]).astype(np.int32)
    gpu = np.concatenate([static_gpu_E(32, gpus), rng.integers(0, gpus, extra)]).astype(np.int32)
    expected = LayerPlan.build(0, expert, gpu, np.arange(32 + extra) < 32, num_experts=32, num_gpus=gpus)
    primary = np.empty(32 + extra, np.bool_)
    sort_plan(32 + extra, terms, expert, gpu, primary)
    assert LayerPlan(0, expert, gpu, primary).to_json() == expected.to_json()


def test_bad_parameters_are_one_sentence():
    with pytest.raises(UserError, match="fuel"):
        ElasticParams(fuel=-1)
    with pytest.raises(UserError, match="economy"):
        ElasticParams(economy=float("nan"))


def test_compiled_search_equals_its_plain_python():
    plan = plan_for(skewed(6, 30_000), extra=2, scenarios=0, skip=False)
    terms = setting().costs.terms()
    for tokens in (100, 3000, 30_000):
        found = []
        for search in (choose_copies, choose_copies.py_func):
            got = np.zeros(plan.R, np.int64)
            search(
                skewed(7, tokens), plan.expert_R, plan.gpu_R, plan.primary_R, np.ones(plan.R, bool), 8,
                terms.token_seconds, terms.floor_seconds, 2 * terms.link_seconds, 3, 1000, got,
            )  # fmt: skip
            found.append(got)
        np.testing.assert_array_equal(*found)


@given(st.integers(0, 2**31), st.sampled_from([30, 1000, 60_000]), st.integers(2, 9), st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_no_plan_beats_the_bound_that_skips_layers(seed, tokens, gpus, extra):
    terms = setting(gpus).costs.terms()
    numbers = terms.token_seconds, terms.floor_seconds, 2 * terms.link_seconds
    load_CE = np.stack([skewed(seed + i, tokens) for i in range(4)])
    plan = plan_for(load_CE[0], gpus, extra, scenarios=0, skip=False)
    order = np.argsort(~plan.primary_R * 100 + plan.expert_R, kind="stable")
    scored = score_static(load_CE, static_gpu_E(32, gpus), gpus, plan.num_extra, Rates(*numbers))
    static, reached = expected_seconds(load_CE, plan.expert_R[order], plan.gpu_R[order], gpus, *numbers, 3, 4000)
    assert scored.static_seconds == static
    assert scored.rest_C[0] <= reached <= static
