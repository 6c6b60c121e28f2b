"""What every planner keeps: experts served, caps held, determinism, degenerate input as a plan or a sentence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.contracts import Budget, Forecast, InstanceState, LayerPlan, Phase, PlanInput
from moeless.errors import UserError
from moeless.placement import PLANNERS, Planner
from moeless.placement.params import make_params, parse_assignments
from moeless.placement.plan_rows import batch_of
from moeless.placement.whole_model import spread_over_sources
from tests.placement.conftest import make_setting

EXPERT_BYTES = 3 * 2880 * 2880 * 2
ONLINE = [name for name in PLANNERS.names() if name != "milp"]
loads = st.lists(st.integers(0, 20_000), min_size=1, max_size=24)


@pytest.mark.parametrize("name", ONLINE)
@given(load=loads, gpus=st.integers(1, 10), extra=st.integers(0, 2))
@settings(max_examples=20, deadline=None)
def test_every_expert_is_served_within_the_caps(plan_with, name, load, gpus, extra):
    budget = Budget.even(len(load), gpus, extra, EXPERT_BYTES)
    plan = plan_with(name, load, gpus, extra)
    plan.validate(num_experts=len(load), num_gpus=gpus)
    assert (plan.replicas_E(len(load)) >= 1).all()
    assert (plan.slots_G(gpus) <= budget.slots_G).all()
    assert plan.num_extra <= budget.max_extra
    assert plan.to_json() == plan_with(name, load, gpus, extra).to_json()
    again = plan_with(name, load[::-1], gpus, extra, previous=plan)
    assert (again.slots_G(gpus) <= budget.slots_G).all()


#: Loads of which no two have equal parts: ties go to the lowest index, which relabelling changes.
PRIMES = [n for n in range(11, 9000) if all(n % k for k in range(2, int(n**0.5) + 1))]


@given(
    order=st.permutations(range(16)),
    load=st.lists(st.sampled_from(PRIMES), min_size=16, max_size=16, unique=True),
    extra=st.integers(0, 2),
)
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("name", ["eplb", "eplb-hierarchical", "moeless"])
def test_relabelling_experts_keeps_the_gpu_loads(plan_with, name, order, load, extra):
    load = np.array(load, float)

    def gpu_loads(weight):
        plan = plan_with(name, weight, 4, extra)
        share = weight[plan.expert_R] / plan.replicas_E(16)[plan.expert_R]
        return np.sort(np.bincount(plan.gpu_R, weights=share, minlength=4))

    np.testing.assert_allclose(gpu_loads(load), gpu_loads(load[np.array(order)]), rtol=1e-5)


def check_conserved(load_SE, plan, quota_SR):
    assert (quota_SR >= 0).all()
    for expert in range(load_SE.shape[1]):
        np.testing.assert_array_equal(quota_SR[:, plan.expert_R == expert].sum(1), load_SE[:, expert])


@pytest.mark.parametrize("name", ONLINE)
@given(
    seed=st.integers(0, 2**31),
    gpus=st.integers(1, 9),
    tokens=st.sampled_from([0, 5, 600, 60_000]),
    ready=st.sampled_from([0.0, 0.5, 1.0]),
    costs=st.sampled_from(["roofline", "paper"]),
)
@settings(max_examples=20, deadline=None)
def test_tokens_are_conserved_per_source_rank(plan_with, dispatch_with, name, seed, gpus, tokens, ready, costs):
    rng = np.random.default_rng(seed)
    plan = plan_with(name, rng.integers(0, 20_000, 10), gpus, 1, costs=costs)
    load_SE = rng.multinomial(tokens, rng.dirichlet(np.full(gpus * 10, 0.3))).reshape(gpus, 10)
    usable_R = rng.random(plan.R) < ready
    quota_SR = dispatch_with(name, load_SE, plan, usable_R, costs)
    check_conserved(load_SE, plan, quota_SR)
    np.testing.assert_array_equal(quota_SR, dispatch_with(name, load_SE, plan, usable_R, costs))
    # a copy that is not there serves only where its expert has none that is: then its primary is waited for
    waited = plan.primary_R & ~np.isin(plan.expert_R, plan.expert_R[usable_R])
    assert not quota_SR[:, ~usable_R & ~waited].any()


#: name: loads, GPUs, extra slots.
DEGENERATE = {
    "all tokens to one expert": ([1_000_000] + [0] * 7, 4, 1),
    "no tokens": ([0] * 8, 4, 1),
    "one GPU": ([5, 3, 0, 9], 1, 1),
    "slots exactly experts over GPUs": (list(range(8)), 4, 0),
    "one slot a GPU": (list(range(8)), 8, 0),
    "more GPUs than experts": ([5, 3], 7, 1),
    "more GPUs than experts, no extra slot": ([5, 3], 7, 0),
    "experts that GPUs do not divide": (list(range(10)), 4, 1),
    "one expert": ([7], 3, 1),
}


@pytest.mark.parametrize("name", PLANNERS.names())
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_input_gives_a_valid_plan_and_dispatch(plan_with, dispatch_with, name, case):
    load, gpus, extra = DEGENERATE[case]
    plan = plan_with(name, load, gpus, extra)
    assert (plan.replicas_E(len(load)) >= 1).all()
    assert (plan.slots_G(gpus) <= Budget.even(len(load), gpus, extra, EXPERT_BYTES).slots_G).all()
    load_SE = spread_over_sources(np.array(load), gpus)
    check_conserved(load_SE, plan, dispatch_with(name, load_SE, plan))


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [-1.0, 1.0], [np.inf, 1.0]])
def test_a_forecast_that_is_no_load_is_one_sentence_before_any_planner_sees_it(bad):
    for mean, variance in ((bad, [0.0, 0.0]), ([1.0, 1.0], bad)):
        with pytest.raises(UserError, match="forecast") as caught:
            Forecast(np.array(mean), np.array(variance), 1, "test")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PLANNERS.names())
def test_too_little_memory_is_one_sentence(plan_with, name):
    small = Budget(np.full(4, 1), np.full(4, 1e12), 4)
    with pytest.raises(UserError, match="memory is too small"):
        plan_with(name, [1.0] * 8, 4, budget=small)
    few_bytes = Budget(np.full(4, 4), np.full(4, 1.5 * EXPERT_BYTES), 4)
    with pytest.raises(UserError, match="memory is too small"):
        plan_with(name, [1.0] * 8, 4, budget=few_bytes)


def test_unequal_slots_are_used(plan_with):
    budget = Budget(np.array([1, 2, 3, 6]), np.full(4, 1e12), 4)
    for name in ("eplb", "moeless"):
        plan = plan_with(name, [9.0, 1, 1, 1, 1, 1, 1, 1], 4, budget=budget, **(
            {"cv_threshold": 0.0} if name == "moeless" else {}
        ))  # fmt: skip
        assert plan.R == 12
        assert plan.slots_G(4).tolist() == [1, 2, 3, 6]


def test_params_are_read_from_text_and_refused_by_name():
    planner = PLANNERS.get("moeless")
    made = make_params(planner, parse_assignments(["cv_threshold=0.4", "count-idle=yes", "memory_cap_bytes=none"]))
    assert (made.cv_threshold, made.count_idle, made.memory_cap_bytes) == (0.4, True, None)
    with pytest.raises(UserError, match="there are: cv_threshold"):
        make_params(planner, {"threshold": "1"})
    with pytest.raises(UserError, match="must be a number"):
        make_params(planner, {"cv_threshold": "much"})
    with pytest.raises(UserError, match="name=value"):
        parse_assignments(["cv_threshold"])


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_expected_loads_spread_evenly_over_sources(load, sources):
    spread = spread_over_sources(np.array(load), sources)
    np.testing.assert_array_equal(spread.sum(0), load)
    assert np.ptp(spread.sum(1)) <= 1


def test_a_planner_plans_layer_by_layer_or_several_layers_at_once():
    kept = {field: getattr(PLANNERS.get("static"), field) for field in ("dispatch", "params", "cadence", "source")}
    rest = kept | {"name": "made", "needs_forecast": False, "default_predictor": "none"}
    by_layer, at_once = PLANNERS.get("static").plan_layer, PLANNERS.get("moeless").plan_layers
    assert None not in (by_layer, at_once)
    for wrong in ({}, {"plan_layer": by_layer, "plan_layers": at_once}):
        with pytest.raises(UserError, match="give plan_layer or plan_layers"):
            Planner(**rest, **wrong)


@pytest.mark.parametrize("name", ["eplb", "moeless", "elastic"])
@pytest.mark.parametrize("layers", [0, 1, 7])
def test_several_layers_together_are_planned_as_each_alone(name, layers):
    planner, setting = PLANNERS.get(name), make_setting(name, 12, 4)
    rng = np.random.default_rng(layers)

    def inputs(previous):
        loads = rng.dirichlet(np.full(12, 0.5), layers) * 40_000
        return [
            PlanInput(0, Phase.DECODE, Forecast(load, load, 40_000, "test"), before)
            for load, before in zip(loads, previous, strict=True)
        ]

    first = planner.plan_all(inputs([None] * layers), setting)
    # some layers have a plan already, others none
    again = inputs([plan if n % 2 else None for n, plan in enumerate(first)])
    together = planner.plan_all(again, setting)
    assert [plan.to_json() for plan in together] == [planner.plan(x, setting).to_json() for x in again]
    if layers:
        rows = planner.plan_many(batch_of(again), setting)
        wider = rows.widened(rows.widest + 3)
        assert [wider.plan(n, 0).to_json() for n in range(layers)] == [plan.to_json() for plan in together]


@given(st.integers(0, 2**31), st.lists(st.sampled_from(["none", "plan", "shares", "states"]), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_a_batch_gives_back_the_layers_it_was_made_of(seed, kinds):
    rng, xs = np.random.default_rng(seed), []
    for layer, kind in enumerate(kinds):
        expert = np.concatenate([np.arange(5), rng.integers(0, 5, int(rng.integers(0, 4)))])
        share = 1.0 / np.bincount(expert)[expert] if kind == "shares" else None
        previous = LayerPlan.build(
            layer, expert, rng.integers(0, 3, len(expert)), np.arange(len(expert)) < 5, num_experts=5, num_gpus=3,
            share_R=share,
        )  # fmt: skip
        states = rng.integers(0, len(InstanceState), previous.R).astype(np.uint8) if kind == "states" else None
        forecast = Forecast(rng.random(5), rng.random(5), 7, "test")
        before = None if kind == "none" else previous
        xs.append(PlanInput(layer, Phase.DECODE, forecast, before, states, layer, float(layer), 1e-3))
    batch = batch_of(xs)
    assert len(batch) == len(xs)
    for row, x in enumerate(xs):
        found = batch.input(row)
        assert (found.layer, found.phase, found.horizon_iterations) == (x.layer, x.phase, x.horizon_iterations)
        assert (found.lead_seconds, found.copy_seconds) == (x.lead_seconds, x.copy_seconds)
        np.testing.assert_array_equal(found.forecast.mean_E, x.forecast.mean_E)
        np.testing.assert_array_equal(found.forecast.var_E, x.forecast.var_E)
        assert (found.previous is None) == (x.previous is None)
        if x.previous is not None:
            assert found.previous.to_json() == x.previous.to_json()
            # no states stand for copies that are all there
            states = np.full(x.previous.R, InstanceState.WARM, np.uint8) if x.state_R is None else x.state_R
            np.testing.assert_array_equal(found.state_R, states)
