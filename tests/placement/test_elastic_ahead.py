"""Shares fixed ahead: taken only where they are expected to pay, kept within the caps, split without other counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import Budget, Forecast, LayerPlan, Phase, PlanInput
from moeless.costs import COSTS
from moeless.errors import UserError
from moeless.placement import PLANNERS, elastic
from moeless.placement.elastic_ahead import ElasticAheadParams, dispatch, plan_layer, plan_layers
from moeless.placement.fixed_kernels import fix_shares, shared_seconds
from moeless.placement.layout import static_gpu_E
from moeless.placement.whole_model import spread_over_sources
from moeless.spec import preset

SPEC = preset("gpt-oss-20b").with_expert_dtype("bfloat16")
H100 = cluster("h100x8")


def inputs(mean, phase=Phase.DECODE, previous=None, var=None, horizon=1) -> PlanInput:
    mean = np.asarray(mean, float)
    return PlanInput(0, phase, Forecast(mean, mean if var is None else var, 1, "test"), previous, None, horizon)


def with_setting(function, x, costs="roofline", extra=1, charge=True, **params):
    model = COSTS.get(costs)(SPEC, H100, **({"charge_control": charge} if costs == "roofline" else {}))
    return function(
        x, spec=SPEC, cluster=H100, costs=model, budget=Budget.even(32, 8, extra, SPEC.expert_bytes),
        params=ElasticAheadParams(**params),
    )  # fmt: skip


def skewed(seed: int, tokens: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.multinomial(tokens, rng.dirichlet(np.full(32, 2.0)))


def test_shares_are_fixed_where_dispatch_does_not_pay_for_its_control():
    plan = with_setting(plan_layer, inputs(skewed(0, 8192)))
    assert plan.share_R is not None
    assert plan.num_extra > 0
    assert not plan.decides
    plan.validate(num_experts=32, num_gpus=8)
    assert (plan.gpu_R[plan.primary_R] == static_gpu_E(32, 8)[plan.expert_R[plan.primary_R]]).all()
    # large batches: dispatch from true counts saves far more than its control takes
    assert with_setting(plan_layer, inputs(skewed(0, 500_000), Phase.PREFILL)).decides
    # equal loads, known exactly: nothing can be saved
    assert with_setting(plan_layer, inputs(np.full(32, 256), var=np.zeros(32))).num_extra == 0


def test_it_is_elastic_where_control_costs_nothing():
    for load in (skewed(1, 8192), skewed(2, 60_000)):
        for costs, charge in (("roofline", False), ("paper", True)):
            model = COSTS.get(costs)(SPEC, H100, **({"charge_control": charge} if costs == "roofline" else {}))
            mine = with_setting(plan_layer, inputs(load), costs, charge=charge)
            its = elastic.plan_layer(
                inputs(load), spec=SPEC, cluster=H100, costs=model,
                budget=Budget.even(32, 8, 1, SPEC.expert_bytes), params=elastic.ElasticParams(),
            )  # fmt: skip
            assert mine.to_json() == its.to_json()


def test_caution_turns_fixed_shares_away_and_no_scenarios_do_too():
    load = skewed(0, 8192)
    assert with_setting(plan_layer, inputs(load), caution=50.0).share_R is None
    assert with_setting(plan_layer, inputs(load), margin=0.9).share_R is None
    assert with_setting(plan_layer, inputs(load), share_scenarios=0).share_R is None
    with pytest.raises(UserError, match="caution must be a number of at least 0"):
        ElasticAheadParams(caution=-1.0)


def test_a_small_change_of_the_forecast_leaves_copies_and_shares():
    first = with_setting(plan_layer, inputs(skewed(0, 8192)))
    assert with_setting(plan_layer, inputs(skewed(0, 8192) + 1, previous=first)).to_json() == first.to_json()
    # one that stays for ever is worth its transfers
    other = with_setting(plan_layer, inputs(skewed(5, 8192), previous=first, horizon=10**9))
    assert other.to_json() != first.to_json()


def test_all_layers_at_once_are_the_layers_one_by_one():
    xs = [inputs(skewed(seed, 8192)) for seed in range(6)]
    together = with_setting(plan_layers, xs)
    assert [p.to_json() for p in together] == [with_setting(plan_layer, x).to_json() for x in xs]
    assert any(p.share_R is not None for p in together)


def test_a_plan_with_shares_goes_through_json_and_bad_shares_are_refused():
    plan = with_setting(plan_layer, inputs(skewed(0, 8192)))
    again = LayerPlan.from_json(plan.to_json(), num_experts=32, num_gpus=8)
    np.testing.assert_array_equal(again.share_R, plan.share_R)
    for bad in ([1.0, 0.5, 0.25], [1.0, -1.0, 2.0], [1.0, 1.0]):
        with pytest.raises(UserError, match="shares"):
            LayerPlan.build(0, [0, 1, 1], [0, 1, 0], [True, True, False], num_experts=2, num_gpus=2, share_R=bad)


@given(st.integers(0, 2**31), st.sampled_from([30, 2000, 60_000]), st.integers(1, 9), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_fixed_shares_conserve_tokens_and_need_no_other_ranks_counts(seed, tokens, gpus, ready):
    rng = np.random.default_rng(seed)
    expert = np.concatenate([np.arange(10), rng.integers(0, 10, 6)])
    share = rng.random(16) * (rng.random(16) < 0.7) + 1e-12
    share /= np.bincount(expert, weights=share)[expert]
    gpu = rng.integers(0, gpus, 16)
    plan = LayerPlan.build(0, expert, gpu, np.arange(16) < 10, num_experts=10, num_gpus=gpus, share_R=share)
    load = rng.multinomial(tokens, rng.dirichlet(np.full(gpus * 10, 0.3))).reshape(gpus, 10)
    usable = plan.primary_R | (rng.random(16) < ready)
    shared = {"spec": SPEC, "cluster": H100, "costs": COSTS.get("roofline")(SPEC, H100), "params": ElasticAheadParams()}
    quota = dispatch(load, plan, usable, **shared)
    for e in range(10):
        np.testing.assert_array_equal(quota[:, plan.expert_R == e].sum(1), load[:, e])
    assert (quota >= 0).all()
    assert (quota[:, ~usable] == 0).all()
    alone = np.zeros_like(load)
    alone[0] = load[0]
    np.testing.assert_array_equal(dispatch(alone, plan, usable, **shared)[0], quota[0])
    if usable.all():
        ideal = load[:, plan.expert_R] * plan.share_R
        assert np.abs(quota - ideal).max() < 1 + 1e-6


@given(st.integers(0, 2**31), st.sampled_from([100, 8192, 200_000]), st.integers(2, 8), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_the_search_never_ends_above_static_and_its_time_is_that_of_its_copies(seed, tokens, gpus, extra):
    rng = np.random.default_rng(seed)
    experts = 12
    load = rng.multinomial(tokens, rng.dirichlet(np.full(experts, 0.7)), size=3).astype(np.int64)
    gpu_E = static_gpu_E(experts, gpus)
    room = np.bincount(gpu_E, minlength=gpus) + rng.integers(0, 3, gpus)
    extra = min(extra, int(room.sum()) - experts)
    expert, gpu, share = (
        np.empty(experts + extra, np.int32),
        np.empty(experts + extra, np.int32),
        np.empty(experts + extra),
    )
    a, b, c = 7e-8, 1.6e-5, 2e-8
    time, moved = np.empty((3, gpus)), np.empty((3, gpus))
    plain = shared_seconds(load, np.arange(experts), gpu_E, np.ones(experts), a, b, c, time, moved)
    count, reached = fix_shares(load, gpu_E, room, extra, a, b, c, 1e-3, expert, gpu, share)
    assert reached <= plain
    plan = LayerPlan.build(
        0, expert[:count], gpu[:count], np.arange(count) < experts, num_experts=experts, num_gpus=gpus,
        share_R=share[:count],
    )  # fmt: skip
    assert (plan.slots_G(gpus) <= room).all()
    assert len({(e, g) for e, g in zip(expert[:count].tolist(), gpu[:count].tolist(), strict=True)}) == count
    again = shared_seconds(load, expert[:count], gpu[:count], share[:count], a, b, c, time, moved)
    np.testing.assert_allclose(again, reached, rtol=1e-12)


def test_a_wrong_forecast_makes_fixed_shares_slower_than_static():
    """The price of the guarantee, the other way round: this is what layers of kind (c) can not promise."""
    plan = with_setting(plan_layer, inputs(skewed(0, 8192)))
    model = COSTS.get("roofline")(SPEC, H100)
    planner, worst = PLANNERS.get("elastic-ahead"), 0.0
    for seed in range(1, 20):
        load_SE = spread_over_sources(skewed(seed, 8192), 8)
        quota = planner.dispatch(
            load_SE, plan, np.ones(plan.R, bool), spec=SPEC, cluster=H100, costs=model, params=planner.params()
        )
        home = np.flatnonzero(plan.primary_R)[np.argsort(plan.expert_R[plan.primary_R])]
        static = np.zeros_like(quota)
        static[:, home] = load_SE
        worst = max(worst, model.layer_seconds(quota, plan).total / model.layer_seconds(static, plan).total)
    assert worst > 1.0


def test_a_cost_model_that_is_no_lines_has_the_last_word(monkeypatch):
    model = COSTS.get("roofline")(SPEC, H100)
    shared = {"spec": SPEC, "cluster": H100, "budget": Budget.even(32, 8, 1, SPEC.expert_bytes)}
    monkeypatch.setattr(type(model), "kernel_terms", lambda _: None)
    x = inputs(skewed(0, 8192))
    assert plan_layer(x, costs=model, params=ElasticAheadParams(), **shared).share_R is not None
    # a layer that takes longer the more copies work
    times = type(model).layer_seconds

    def dear(self, quota_SR, plan):
        time = times(self, quota_SR, plan)
        return replace(time, expert=time.expert + 1e-3 * (quota_SR.sum(0) > 0)[~plan.primary_R].sum())

    monkeypatch.setattr(type(model), "layer_seconds", dear)
    assert plan_layer(x, costs=model, params=ElasticAheadParams(), **shared).share_R is None
