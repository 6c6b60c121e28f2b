"""Shares fixed ahead: taken only where they are expected to pay, kept within the caps, split without other counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import Budget, Forecast, LayerPlan, Phase, PlanInput
from moeless.costs import COSTS
from moeless.costs.layer_time import curves
from moeless.costs.roofline import RooflineCosts
from moeless.errors import UserError
from moeless.placement import elastic
from moeless.placement.elastic_ahead import PLANNER, ElasticAheadParams
from moeless.placement.fixed_shares import fix_shares, shared_seconds
from moeless.placement.layout import static_gpu_E
from moeless.placement.setting import Setting
from moeless.placement.whole_model import spread_over_sources
from moeless.spec import preset

SPEC = preset("gpt-oss-20b").with_expert_dtype("bfloat16")
H100 = cluster("h100x8")


def inputs(mean, phase=Phase.DECODE, previous=None, var=None, horizon=1) -> PlanInput:
    mean = np.asarray(mean, float)
    return PlanInput(0, phase, Forecast(mean, mean if var is None else var, 1, "test"), previous, None, horizon)


def setting(costs="roofline", charge=True, **params) -> Setting:
    model = COSTS.get(costs)(SPEC, H100, **({"charge_control": charge} if costs == "roofline" else {}))
    return Setting(SPEC, H100, model, Budget.even(32, 8, 1, SPEC.expert_bytes), ElasticAheadParams(**params))


def planned(x: PlanInput, costs="roofline", charge=True, **params) -> LayerPlan:
    return PLANNER.plan(x, setting(costs, charge, **params))


def skewed(seed: int, tokens: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.multinomial(tokens, rng.dirichlet(np.full(32, 2.0)))


def test_shares_are_fixed_where_dispatch_does_not_pay_for_its_control():
    plan = planned(inputs(skewed(0, 8192)))
    assert plan.share_R is not None
    assert plan.num_extra > 0
    assert not plan.decides
    plan.validate(num_experts=32, num_gpus=8)
    assert (plan.gpu_R[plan.primary_R] == static_gpu_E(32, 8)[plan.expert_R[plan.primary_R]]).all()
    # large batches: dispatch from true counts saves far more than its control takes
    assert planned(inputs(skewed(0, 500_000), Phase.PREFILL)).decides
    # equal loads, known exactly: nothing can be saved
    assert planned(inputs(np.full(32, 256), var=np.zeros(32))).num_extra == 0


def test_it_is_elastic_where_control_costs_nothing():
    for load in (skewed(1, 8192), skewed(2, 60_000)):
        for costs, charge in (("roofline", False), ("paper", True)):
            where = setting(costs, charge)
            its = Setting(SPEC, H100, where.costs, where.budget, elastic.ElasticParams())
            assert PLANNER.plan(inputs(load), where).to_json() == elastic.PLANNER.plan(inputs(load), its).to_json()


def test_caution_turns_fixed_shares_away_and_no_scenarios_do_too():
    load = skewed(0, 8192)
    assert planned(inputs(load), caution=50.0).share_R is None
    assert planned(inputs(load), margin=0.9).share_R is None
    assert planned(inputs(load), share_scenarios=0).share_R is None
    with pytest.raises(UserError, match="caution must be a number of at least 0"):
        ElasticAheadParams(caution=-1.0)


def test_a_small_change_of_the_forecast_leaves_copies_and_shares():
    first = planned(inputs(skewed(0, 8192)))
    assert planned(inputs(skewed(0, 8192) + 1, previous=first)).to_json() == first.to_json()
    # one that stays for ever is worth its transfers
    other = planned(inputs(skewed(5, 8192), previous=first, horizon=10**9))
    assert other.to_json() != first.to_json()


def test_all_layers_at_once_are_the_layers_one_by_one():
    xs = [inputs(skewed(seed, 8192)) for seed in range(6)]
    together = PLANNER.plan_all(xs, setting())
    assert [p.to_json() for p in together] == [planned(x).to_json() for x in xs]
    assert any(p.share_R is not None for p in together)


def test_a_plan_with_shares_goes_through_json_and_bad_shares_are_refused():
    plan = planned(inputs(skewed(0, 8192)))
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
    quota = PLANNER.dispatch(load, plan, usable, setting())
    for e in range(10):
        np.testing.assert_array_equal(quota[:, plan.expert_R == e].sum(1), load[:, e])
    assert (quota >= 0).all()
    assert (quota[:, ~usable] == 0).all()
    alone = np.zeros_like(load)
    alone[0] = load[0]
    np.testing.assert_array_equal(PLANNER.dispatch(alone, plan, usable, setting())[0], quota[0])
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
    plan = planned(inputs(skewed(0, 8192)))
    where, worst = setting(), 0.0
    model = where.costs
    for seed in range(1, 20):
        load_SE = spread_over_sources(skewed(seed, 8192), 8)
        quota = PLANNER.dispatch(load_SE, plan, np.ones(plan.R, bool), where)
        home = np.flatnonzero(plan.primary_R)[np.argsort(plan.expert_R[plan.primary_R])]
        static = np.zeros_like(quota)
        static[:, home] = load_SE
        worst = max(worst, model.layer_seconds(quota, plan).total / model.layer_seconds(static, plan).total)
    assert worst > 1.0


class TabledCosts(RooflineCosts):
    """Roofline's lines for the search; a table in which each active expert beyond four takes ``dear`` more."""

    dear = 0.0

    def make_layer_costs(self):
        tokens_N, active_K = np.array([1.0, 64.0, 230.0, 4096.0, 65_536.0]), np.arange(1, SPEC.E + 1)
        seconds_KN = active_K[:, None] * np.maximum(tokens_N * self.token_seconds, self.floor_seconds)
        seconds_KN += self.dear * np.maximum(active_K - 4, 0)[:, None]
        costs = super().make_layer_costs()
        points = curves({})
        tables = costs.tables._replace(
            tokens_N=tokens_N, seconds_KN=seconds_KN, measured_active=SPEC.E, curve_CXN=points[0], points_C=points[1]
        )
        return costs._replace(tables=tables)


def test_a_cost_model_that_is_no_lines_has_the_last_word():
    x, room, params = inputs(skewed(0, 8192)), setting().budget, ElasticAheadParams()
    plain, dear = TabledCosts(SPEC, H100), TabledCosts(SPEC, H100)
    assert PLANNER.plan(x, Setting(SPEC, H100, plain, room, params)).share_R is not None
    # a layer that takes longer where a GPU computes more experts than its own
    dear.dear = 1e-3
    assert PLANNER.plan(x, Setting(SPEC, H100, dear, room, params)).share_R is None
