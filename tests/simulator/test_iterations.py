"""One engine for every planner: compiled and Python rules, planning one by one and together, watched and not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import Forecast, LayerPlan, Phase, Policy
from moeless.costs import COSTS
from moeless.placement import PLANNERS
from moeless.placement.dispatch import DispatchRule
from moeless.placement.plan_reuse import hardly_changed
from moeless.placement.plan_rows import rows_of
from moeless.policy import resolve
from moeless.policy.reuse import PlanReuse
from moeless.predictors import PREDICTORS
from moeless.serverless import PoolSettings
from moeless.serverless.keep_alive import KeepAlive
from moeless.simulator import SimulationSettings, simulate, tally
from moeless.simulator.layer_timing import survey, time_layers
from moeless.simulator.timeline import Timeline
from moeless.spec import Attention, MoESpec
from moeless.workloads.schedulers import Continuous
from tests.simulator.conftest import one_step_at_a_time

SPEC = MoESpec(
    name="sixteen",
    hidden_size=1024,
    num_layers=2,
    moe_layers=(0, 1),
    num_experts=16,
    top_k=2,
    expert_intermediate_size=2048,
    attention=Attention(heads=4, kv_heads=2, head_dim=64),
    vocab_size=100,
)
GPUS = 4
POOLS = {
    "host": PoolSettings(),
    "instant": PoolSettings(instant=True),
    "short": PoolSettings(start_seconds=0.001, keep_alive=KeepAlive("fixed", 0.002)),
    "adaptive": PoolSettings(keep_alive=KeepAlive("adaptive", 0.002)),
}
PLANNED = ["moeless:history:1", "moeless:oracle:2", "elastic:history:1", "elastic:last:2", "elastic-ahead:history:1"]
ALL = [*PLANNED, "static", "oracle", "eplb:history", "metro:history", "llep:history", "craft:history"]


def runtime_for(spec, policy, costs="roofline", planner=None, **params):
    where = cluster("h100x8").with_gpus(GPUS)
    made = resolve(
        Policy.parse(policy),
        spec=spec,
        cluster=where,
        costs=COSTS.get(costs)(spec, where),
        extra_slots=1,
        predictors={name: PREDICTORS.get(name)(spec) for name in ("history", "last", "oracle")},
        params=params,
    )
    return made if planner is None else dataclasses.replace(made, planner=planner(made.planner))


@pytest.fixture
def run(spec, requests, replay_for):
    """A small workload under a policy."""

    def one(runtime, pool="host", timeline=None, hide=False, plan_every=1):
        scheduler = Continuous(requests, GPUS, token_budget=64, max_running=12)
        return simulate(
            replay_for(GPUS),
            requests,
            one_step_at_a_time(scheduler) if hide else scheduler,
            runtime,
            settings=SimulationSettings(POOLS[pool], replan_seconds=0.02, plan_every=plan_every),
            timeline=timeline,
        )

    return one


def params_of(policy):
    return {"skip": False, "keep": 0.0} if policy.startswith("elastic") else {}


def assert_same(one, other):
    assert one.record.times_IL == pytest.approx(other.record.times_IL, rel=1e-6)
    assert one.record.tally == pytest.approx(other.record.tally, rel=1e-9)
    assert one.end == pytest.approx(other.end, rel=1e-9)
    assert dataclasses.asdict(one.cell.billing) == pytest.approx(dataclasses.asdict(other.cell.billing), rel=1e-6)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("policy", PLANNED)
def test_a_rule_in_python_takes_the_same_as_compiled(policy, pool, spec, run):
    def in_python(planner):
        rule = planner.dispatch
        return dataclasses.replace(
            planner, dispatch=DispatchRule(rule.gathers_counts, quotas=rule, timed_as=rule.timed_as)
        )

    compiled = run(runtime_for(spec, policy, **params_of(policy)), pool)
    slow = run(runtime_for(spec, policy, planner=in_python, **params_of(policy)), pool)
    assert compiled.record.iterations > 20
    assert compiled.cell.layer.replicas > spec.E
    assert_same(slow, compiled)


@pytest.mark.parametrize("costs", ["paper", "roofline"])
@pytest.mark.parametrize("policy", PLANNED)
def test_planning_layer_by_layer_gives_the_plans_made_together(policy, costs, spec, run):
    def one_by_one(planner):
        return dataclasses.replace(planner, plan_layer=planner.plan, plan_layers=None)

    together = run(runtime_for(spec, policy, costs, **params_of(policy)))
    apart = run(runtime_for(spec, policy, costs, planner=one_by_one, **params_of(policy)))
    np.testing.assert_array_equal(apart.record.times_IL, together.record.times_IL)
    np.testing.assert_array_equal(apart.pool.ready_LEG, together.pool.ready_LEG)
    assert dict(apart.record.stalls) == dict(together.record.stalls)


@pytest.mark.parametrize("policy", ALL)
def test_a_run_is_the_same_watched_stepped_and_in_one_go(policy, spec, run):
    runtime = runtime_for(spec, policy)
    free = run(runtime)
    assert_same(run(runtime, timeline=Timeline(0.0, 1e9)), free)
    assert_same(run(runtime, hide=True), free)


@pytest.mark.parametrize("costs", ["paper", "roofline"])
@pytest.mark.parametrize(
    ("policy", "plan_every", "params"),
    [
        ("elastic-ahead:history:1", 1, {"keep": 0.3}),
        ("elastic:history:1", 2, {"skip": False}),
        ("elastic:history:1", 1, {}),
    ],
)
def test_runs_that_keep_plans_are_the_same_watched_stepped_and_in_one_go(policy, plan_every, params, costs, spec, run):
    runtime = runtime_for(spec, policy, costs, **params)
    free = run(runtime, "instant", plan_every=plan_every)
    assert_same(run(runtime, "instant", timeline=Timeline(0.0, 1e9), plan_every=plan_every), free)
    assert_same(run(runtime, "instant", hide=True, plan_every=plan_every), free)


@pytest.mark.parametrize("costs", ["paper", "roofline"])
@pytest.mark.parametrize("policy", ALL)
def test_tokens_time_and_memory_are_conserved(policy, costs, spec, requests, run):
    found = run(runtime_for(spec, policy, costs), "short")
    record = found.record
    assert found.clocks.completed == len(requests)
    parts = record.tally[[tally.EXPERT, tally.EXCHANGE, tally.MISC, tally.CONTROL, tally.STALL]]
    assert parts.sum() == pytest.approx(record.tally[tally.TOTAL], rel=1e-9)
    assert record.times_IL.sum() == pytest.approx(record.tally[tally.TOTAL], rel=1e-4)
    assert record.tally[tally.STALL] == pytest.approx(sum(record.stalls.values()), rel=1e-9, abs=1e-15)
    events = record.times_IL.size
    assert spec.E <= record.tally[tally.REPLICAS] / events <= spec.E + GPUS
    assert record.tally[tally.WARM] <= record.tally[tally.REPLICAS]
    assert record.tally[tally.ACTIVE] <= record.tally[tally.REPLICAS]
    assert found.end >= record.times_IL.sum() * (1 - 1e-4)


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 8, 24]), st.sampled_from([0, 1, 5, 60]))
@settings(max_examples=30, deadline=None)
def test_layers_timed_straight_from_tokens_take_what_the_rules_quotas_take(seed, gpus, mean):
    random = np.random.default_rng(seed)
    experts = SPEC.E
    home_E = random.integers(0, gpus, experts)
    extra = random.integers(0, 12)
    copies = zip(random.integers(0, experts, extra).tolist(), random.integers(0, gpus, extra).tolist(), strict=True)
    pairs = sorted(set(copies) - set(zip(range(experts), home_E.tolist(), strict=True)))
    expert, gpu = [*range(experts), *(e for e, _ in pairs)], [*home_E.tolist(), *(g for _, g in pairs)]
    primary = np.arange(len(expert)) < experts
    plain = LayerPlan.build(0, expert, gpu, primary, num_experts=experts, num_gpus=gpus)
    # shares fixed ahead, some of them nothing
    weight_R = random.random(plain.R) * (random.random(plain.R) < 0.8)
    whole_R = np.bincount(plain.expert_R, weight_R, experts)[plain.expert_R]
    share_R = np.where(whole_R > 0, weight_R / np.maximum(whole_R, 1e-300), 1.0 * plain.primary_R)
    fixed = dataclasses.replace(plain, layer=1, share_R=share_R)
    load_SE = random.poisson(mean * random.gamma(0.3, 3.0, experts), (gpus, experts)).astype(np.int64)
    # one expert a token
    rank_T, topk_T = np.divmod(np.repeat(np.arange(load_SE.size), load_SE.ravel()), experts)
    topk_TLK = np.ascontiguousarray(np.stack([topk_T, topk_T], 1)[:, :, None], np.uint16)
    where = cluster("h100x8") if gpus == 8 else cluster("h100x8x3").with_gpus(gpus)
    rows, gpu_LE = rows_of([plain, fixed]), np.zeros((2, experts), np.int64)
    survey(rows, np.zeros((2, *gpu_LE.shape[1:], 64)), gpu_LE)
    for costs_name in ("paper", "roofline"):
        costs = COSTS.get(costs_name)(SPEC, where)
        for name in ("eplb", "elastic", "metro"):
            runtime = resolve(
                Policy.parse(f"{name}:history"), spec=SPEC, cluster=where, costs=costs, extra_slots=1,
                predictors={"history": PREDICTORS.get("history")(SPEC)},
            )  # fmt: skip
            rule = runtime.planner.dispatch
            part_LX, load_LE = np.zeros((2, tally.NUM_PARTS)), np.empty((2, experts), np.int64)
            time_layers(
                0, 2, np.arange(2), topk_TLK, np.arange(len(rank_T)), rank_T, rows, gpu_LE, rule.address,
                runtime.setting.derived(rule.numbers), np.full(2, 1e-6), costs.layer_costs, part_LX, load_LE,
            )  # fmt: skip
            for plan, part_X in zip((plain, fixed), part_LX, strict=True):
                quota_SR = runtime.dispatch(load_SE, plan, np.ones(plan.R, np.bool_))
                expected = costs.layer_seconds(quota_SR, plan, control=1e-6 if plan.decides else 0.0)
                got = tally.layer_time(part_X, costs.layer_costs)
                assert tuple(got) == pytest.approx(tuple(expected), rel=1e-12)
                assert part_X[tally.ACTIVE_PART] == quota_SR.any(0).sum()
            np.testing.assert_array_equal(load_LE, np.tile(load_SE.sum(0), (2, 1)))


def test_only_changes_up_to_the_tolerance_keep_a_plan():
    planned = np.array([50.0, 30.0, 20.0])
    assert hardly_changed(np.array([52.0, 28.0, 20.0]), planned, 0.05)
    assert not hardly_changed(np.array([53.0, 27.0, 20.0]), planned, 0.05)
    assert not hardly_changed(1.1 * planned, planned, 0.05)
    assert not hardly_changed(np.zeros(3), np.zeros(3), 0.05)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 30, 400, 6000, 60_000]))
def test_a_static_plan_is_kept_only_where_the_planner_would_skip_the_layer(seed, assignments):
    runtime = runtime_for(SPEC, "elastic:history:1", keep=0.0)
    reuse = PlanReuse(runtime, runtime.predictor)
    weight_LE = np.random.default_rng(seed).gamma(0.5, 1.0, (2, SPEC.E))
    nothing = Forecast(np.zeros(SPEC.E), np.zeros(SPEC.E), 0, "none")
    for layer in range(2):
        reuse.note_plan(nothing, dataclasses.replace(runtime.plan(0, Phase.DECODE, nothing), layer=layer))
    kept_L = reuse.kept_by_history(weight_LE, assignments)
    for layer in range(2):
        mean_E = weight_LE[layer] / weight_LE[layer].sum() * assignments
        forecast = Forecast(mean_E, mean_E.copy(), assignments // 2, "history")
        # a run of all layers at once and a live engine's single layers go by the same rule
        assert reuse.keeps(layer, forecast) == kept_L[layer]
        if kept_L[layer]:
            assert runtime.plan(layer, Phase.DECODE, forecast).num_extra == 0
    reuse.forget()
    assert not reuse.kept_by_history(weight_LE, assignments).any()


def test_planners_that_declare_no_reuse_are_always_asked(spec):
    for name in PLANNERS.names():
        planner = PLANNERS.get(name)
        assert (planner.reuse is not None) == name.startswith("elastic")
    reuse = PlanReuse(runtime_for(spec, "moeless:history:1"), None)
    mean_E = np.ones(spec.E)
    reuse.note_plan(Forecast(mean_E, mean_E, 1, "x"), runtime_for(spec, "static").first_plans()[0])
    assert not reuse.keeps(0, Forecast(mean_E, mean_E, 1, "x"))
