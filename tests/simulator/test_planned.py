"""Iterations that plan, compiled, against the same ones taken layer by layer in Python."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import LayerPlan, Policy
from moeless.costs import COSTS
from moeless.costs.kernels import quota_time
from moeless.placement import elastic, elastic_ahead
from moeless.placement.dispatch import even_dispatch, serving_R
from moeless.policy import resolve
from moeless.predictors import PREDICTORS
from moeless.serverless import PoolSettings
from moeless.serverless.keep_alive import KeepAlive
from moeless.simulator import SimulationSettings, simulate
from moeless.simulator.ahead import AheadPlans
from moeless.simulator.layer_kernels import CHOSEN, EVEN, LOAD, load_table, load_tokens, memory, time_layer
from moeless.simulator.timeline import Timeline
from moeless.spec import Attention, MoESpec
from moeless.workloads.schedulers import Continuous

SPEC = MoESpec(
    name="sixteen",
    hidden_size=1024,
    num_layers=1,
    moe_layers=(0,),
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


def runtime_for(spec, policy, costs, **params):
    where = cluster("h100x8").with_gpus(GPUS)
    return resolve(
        Policy.parse(policy),
        spec=spec,
        cluster=where,
        costs=COSTS.get(costs)(spec, where),
        extra_slots=1,
        predictors={name: PREDICTORS.get(name)(spec) for name in ("history", "last", "oracle")},
        params=params,
    )


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("costs", ["paper", "roofline"])
@pytest.mark.parametrize(
    "policy",
    ["moeless:history:1", "moeless:oracle:2", "elastic:history:1", "elastic:last:2", "elastic-ahead:history:1"],
)
def test_planned_iterations_have_the_same_bytes_compiled_and_in_python(pool, costs, policy, spec, requests, replay_for):
    params = {"skip": False, "keep": 0.0} if policy.startswith("elastic") else {}

    def run(timeline):
        scheduler = Continuous(requests, GPUS, token_budget=64, max_running=12)
        return simulate(
            replay_for(GPUS),
            requests,
            scheduler,
            runtime_for(spec, policy, costs, **params),
            settings=SimulationSettings(POOLS[pool]),
            timeline=timeline,
        )

    # a window that covers everything is for Python to tell
    fast, slow = run(None), run(Timeline(0.0, 1e9))
    assert fast.record.iterations > 20
    assert fast.cell.layer.replicas > spec.E
    np.testing.assert_array_equal(fast.record.times_IL, slow.record.times_IL)
    np.testing.assert_array_equal(fast.record.tally, slow.record.tally)
    np.testing.assert_array_equal(fast.pool.ready_LEG, slow.pool.ready_LEG)
    assert dict(fast.record.stalls) == dict(slow.record.stalls)
    assert dataclasses.asdict(fast.cell) == dataclasses.asdict(slow.cell)


@pytest.mark.parametrize(
    ("policy", "plan_every", "params"),
    [
        ("elastic-ahead:history:1", 1, {"keep": 0.3}),
        ("elastic:history:1", 2, {"skip": False}),
    ],
)
def test_iterations_that_keep_their_plans_take_the_same_compiled_and_in_python(
    policy, plan_every, params, spec, requests, replay_for
):
    def run(timeline):
        scheduler = Continuous(requests, GPUS, token_budget=64, max_running=12)
        runtime = runtime_for(spec, policy, "paper", **params)
        chosen = SimulationSettings(PoolSettings(instant=True), plan_every=plan_every)
        return simulate(replay_for(GPUS), requests, scheduler, runtime, settings=chosen, timeline=timeline)

    fast, slow = run(None), run(Timeline(0.0, 1e9))
    assert fast.cell.layer.replicas > spec.E
    np.testing.assert_array_equal(fast.record.times_IL, slow.record.times_IL)


@pytest.mark.parametrize("policy", ["moeless:history:1", "elastic-ahead:history:1"])
def test_planned_iterations_are_compiled(policy, spec, requests, replay_for, monkeypatch):
    monkeypatch.setattr(AheadPlans, "start_layer", lambda *_: pytest.fail("a layer was planned in Python"))
    done = simulate(
        replay_for(GPUS),
        requests,
        Continuous(requests, GPUS),
        runtime_for(spec, policy, "roofline"),
        settings=SimulationSettings(),
    )
    assert done.record.iterations > 20


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 8, 24]), st.sampled_from([0, 1, 5, 60]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_layers_timed_without_tables_equal_the_planners_own_dispatch(seed, gpus, mean, all_serve):
    rng = np.random.default_rng(seed)
    experts = 16
    home_E = rng.integers(0, gpus, experts)
    extra = rng.integers(0, 12)
    copies = zip(rng.integers(0, experts, extra).tolist(), rng.integers(0, gpus, extra).tolist(), strict=True)
    pairs = set(copies) - set(zip(range(experts), home_E.tolist(), strict=True))
    expert = [*range(experts), *(e for e, _ in sorted(pairs))]
    gpu = [*home_E.tolist(), *(g for _, g in sorted(pairs))]
    primary = [True] * experts + [False] * len(pairs)
    plan = LayerPlan.build(0, expert, gpu, primary, num_experts=experts, num_gpus=gpus)
    usable = np.ones(plan.R, np.bool_) if all_serve else rng.random(plan.R) < 0.6
    serving = serving_R(plan, usable, experts)
    load_SE = rng.poisson(mean * rng.gamma(0.3, 3.0, experts), (gpus, experts)).astype(np.int64)
    # one expert a token
    # shares fixed ahead, some of them nothing
    weights_R = rng.random(plan.R) * (rng.random(plan.R) < 0.8)
    rank_T, topk_T = np.divmod(np.repeat(np.arange(load_SE.size), load_SE.ravel()), experts)
    topk_TLK = np.ascontiguousarray(topk_T[:, None, None], np.uint16)
    where = cluster("h100x8") if gpus == 8 else cluster("h100x8x3").with_gpus(gpus)
    for name in ("paper", "roofline"):
        costs = COSTS.get(name)(SPEC, where)
        terms, params, load_G = costs.kernel_terms(), elastic.ElasticParams(), np.empty(gpus)
        rates = elastic.rates_of(costs)
        given_rates = (rates.a, rates.b, rates.c, float(params.depth), float(params.fuel))
        shared = {"spec": SPEC, "cluster": where, "costs": costs, "params": params}
        whole_R = np.bincount(plan.expert_R, weights_R, experts)[plan.expert_R]
        share_R = np.where(whole_R > 0, weights_R / np.maximum(whole_R, 1e-300), 1.0 * plan.primary_R)
        fixed = dataclasses.replace(plan, share_R=share_R)
        for mode, dispatch, split in (
            (EVEN, even_dispatch, plan),
            (CHOSEN, elastic.dispatch, plan),
            (CHOSEN, elastic_ahead.dispatch, fixed),
        ):
            quota_SR = dispatch(load_SE, split, usable, **shared)
            expected = (*quota_time(quota_SR, plan.gpu_R, terms, gpus, load_G), int(quota_SR.any(0).sum()))
            for by_table in (True, False):
                tokens = load_SE.size if by_table else len(rank_T)
                m = memory(gpus, experts, plan.R, gpus, where.island_size, tokens)
                if by_table:
                    load_table(load_SE, m)
                else:
                    load_tokens(topk_TLK, np.arange(len(rank_T)), rank_T, 0, m)
                got = time_layer(
                    plan.expert_R, plan.gpu_R, plan.primary_R, serving.astype(np.int64),
                    np.empty(0) if split is plan else share_R, mode, given_rates, terms, gpus, m,
                )  # fmt: skip
                assert got == expected
                np.testing.assert_array_equal(m.sums_XG[LOAD], load_G)
