import dataclasses

import numpy as np
import pytest

from moeless.cluster import cluster
from moeless.contracts import Policy, Request
from moeless.costs import COSTS
from moeless.costs.nonexpert import NonExpertCosts
from moeless.errors import RunFailed, UserError
from moeless.metrics.requests import parse_goodput
from moeless.policy import resolve
from moeless.serverless import KeepAlive, PoolSettings
from moeless.simulator import SimulationSettings, simulate
from moeless.simulator.routing import balanced_loads, columns, rank_sums
from moeless.simulator.timeline import Timeline
from moeless.workloads.schedulers import Continuous, OneSecond
from tests.simulator.conftest import LastLoad, one_step_at_a_time


def run(spec, requests, replay, policy="static", costs="roofline", gpus=4, scheduler=None, timeline=None, **settings):
    where = cluster("h100x8").with_gpus(gpus)
    model = COSTS.get(costs)(spec, where)
    runtime = resolve(
        Policy.parse(policy),
        spec=spec,
        cluster=where,
        costs=model,
        extra_slots=2,
        predictors={"history": LastLoad(), "last": LastLoad()},
    )
    scheduler = scheduler or Continuous(requests, gpus, token_budget=64, max_running=8)
    return simulate(
        replay(gpus),
        requests,
        scheduler,
        runtime,
        settings=SimulationSettings(**settings),
        objectives=parse_goodput(["ttft:50"]),
    )


POLICIES = ["static", "eplb:history", "moeless:last:1", "oracle"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("costs", ["paper", "roofline"])
def test_every_request_gets_every_token_once_under_every_policy(policy, costs, spec, requests, replay_for):
    got = run(spec, requests, replay_for, policy, costs, replan_seconds=0.01)
    figures = got.cell.request
    assert figures.completed == len(requests)
    assert figures.failed == 0
    assert figures.total_output_tokens == sum(request.output_tokens for request in requests)
    assert got.cell.policy == policy
    assert got.cell.billing.gpu_seconds == pytest.approx(4 * figures.duration)
    assert sum(got.cell.layer.parts_ms.values()) == pytest.approx(got.cell.layer.mean_ms)


def test_two_runs_are_identical(spec, requests, replay_for):
    first, second = (run(spec, requests, replay_for, "moeless:last:1") for _ in range(2))
    assert first.cell == second.cell


@pytest.mark.parametrize("kind", [Continuous, OneSecond])
@pytest.mark.parametrize("policy", ["static", "eplb:history", "oracle"])
def test_steady_decode_steps_in_one_go_equal_single_steps(kind, policy, spec, requests, replay_for, costs_name):
    both = [
        run(spec, requests, replay_for, policy, costs_name, scheduler=scheduler, replan_seconds=0.004)
        for scheduler in (kind(requests, 4), one_step_at_a_time(kind(requests, 4)))
    ]
    assert_same(*both)


@pytest.mark.parametrize("policy", ["elastic:last:1", "moeless:last:1"])
def test_steady_steps_between_plans_equal_single_steps(policy, spec, requests, replay_for, costs_name):
    both = [
        run(spec, requests, replay_for, policy, costs_name, scheduler=scheduler, plan_every=7)
        for scheduler in (Continuous(requests, 4), one_step_at_a_time(Continuous(requests, 4)))
    ]
    assert_same(*both)


@pytest.mark.parametrize("policy", ["elastic:last:1", "moeless:last:1"])
def test_compiled_dispatch_equals_the_planners_own(policy, spec, requests, replay_for, costs_name):
    pool = PoolSettings(instant=True)
    fast = run(spec, requests, replay_for, policy, costs_name, plan_every=7, pool=pool)
    # a window that covers everything keeps each layer out of the compiled loop
    slow = run(spec, requests, replay_for, policy, costs_name, plan_every=7, pool=pool, timeline=Timeline(0.0, 1e9))
    assert_same(fast, slow)


def assert_same(*both):
    fast, slow = (dataclasses.asdict(one.cell) for one in both)
    assert both[0].record.times_IL == pytest.approx(both[1].record.times_IL, rel=1e-6)
    assert both[0].end == pytest.approx(both[1].end, rel=1e-9)
    for part in ("request", "billing"):
        assert fast[part] == pytest.approx(slow[part], rel=1e-6)
    fast["layer"].pop("stalls"), slow["layer"].pop("stalls")
    for name, value in fast["layer"].items():
        assert value == pytest.approx(slow["layer"][name], rel=1e-6), name


def test_one_request_alone_takes_the_sum_of_its_iterations(spec, topk, replay_for, costs_name):
    request = Request(0, 0.0, 8, 3, trace_request=5)
    got = run(spec, [request], lambda g: replay_for(g, topk, [request]), costs=costs_name)
    where = cluster("h100x8").with_gpus(4)
    model, other = COSTS.get(costs_name)(spec, where), NonExpertCosts(spec, where)
    scheduler, expected = Continuous([request], 4), 0.0
    while (iteration := scheduler.next(0.0)) is not None:
        spans = columns(iteration)
        loads = replay_for(4, topk, [request]).loads(spans)
        misc = other.seconds(rank_sums(spans, 4))
        plans = [resolve_static(spec, where, model, layer) for layer in range(spec.L)]
        expected += sum(
            model.layer_seconds(loads[layer][:, plan.expert_R], plan).total for layer, plan in enumerate(plans)
        )
        expected += misc.per_moe_layer * spec.L + misc.once
        scheduler.complete(iteration, 0.0)
    assert got.end == pytest.approx(expected, rel=1e-9)


def resolve_static(spec, where, model, layer):
    runtime = resolve(Policy("static"), spec=spec, cluster=where, costs=model, extra_slots=0, predictors={})
    return runtime.first_plans([None] * spec.L)[layer]


def test_one_gpu_takes_the_sum_over_all_experts_and_exchanges_nothing(spec, requests, replay_for):
    got = run(spec, requests, replay_for, gpus=1)
    assert got.cell.layer.parts_ms["all_to_all"] == 0.0
    assert got.cell.layer.imbalance == 1.0


def test_the_oracle_is_perfectly_balanced_and_labelled_lossy(spec, requests, replay_for):
    requests = [dataclasses.replace(request, arrival=0.0) for request in requests]
    got = run(spec, requests, replay_for, "oracle", scheduler=Continuous(requests, 4, token_budget=4096))
    assert got.cell.lossy
    assert any("override" in warning for warning in got.cell.warnings)
    assert got.cell.layer.imbalance < 1.05
    assert got.cell.layer.imbalance < run(spec, requests, replay_for).cell.layer.imbalance


def test_balanced_loads_keep_sources_and_differ_by_one():
    random = np.random.default_rng(1)
    load = random.integers(0, 9, (3, 4, 8))
    even = balanced_loads(load, np.repeat(np.arange(4), 2))
    assert (even.sum(-1) == load.sum(-1)).all()
    total = even.sum(1)
    assert (total.max(-1) - total.min(-1) <= 1).all()
    per_gpu = total.reshape(3, 4, 2).sum(-1)
    assert (per_gpu.max(-1) - per_gpu.min(-1) <= 1).all()


def test_zero_cost_copies_remove_all_cold_stalls_and_slow_ones_only_delay(spec, requests, replay_for):
    instant = run(
        spec,
        requests,
        replay_for,
        "moeless:last:1",
        pool=PoolSettings(instant=True, keep_alive=KeepAlive("fixed", 0.0)),
    )
    slow = run(spec, requests, replay_for, "moeless:last:1", pool=PoolSettings(keep_alive=KeepAlive("fixed", 0.0)))
    assert instant.cell.layer.stalls["cold"] == 0.0
    assert instant.cell.layer.warm_rate == 1.0
    assert slow.cell.layer.warm_rate < 1.0
    assert slow.cell.layer.moved_bytes > 0


def test_doubling_all_speeds_halves_all_times(spec, requests, replay_for):
    where = cluster("h100x8").with_gpus(4)
    device = where.device
    fast = dataclasses.replace(
        where,
        device=dataclasses.replace(
            device,
            flops=2 * device.flops,
            memory_bandwidth=2 * device.memory_bandwidth,
            launch_seconds=device.launch_seconds / 2,
        ),
        fast=dataclasses.replace(where.fast, bandwidth=2 * where.fast.bandwidth, latency=where.fast.latency / 2),
        slow=dataclasses.replace(where.slow, bandwidth=2 * where.slow.bandwidth, latency=where.slow.latency / 2),
    )
    # all at once, so that arrival times do not matter
    together = [dataclasses.replace(request, arrival=0.0) for request in requests]
    ends = []
    for place in (where, fast):
        runtime = resolve(
            Policy("static"),
            spec=spec,
            cluster=place,
            costs=COSTS.get("roofline")(spec, place),
            extra_slots=0,
            predictors={},
        )
        scheduler = Continuous(together, 4, token_budget=64)
        ends.append(simulate(replay_for(4), together, scheduler, runtime, settings=SimulationSettings()))
    assert ends[1].end == pytest.approx(ends[0].end / 2)
    assert ends[1].cell.layer.p99_ms == pytest.approx(ends[0].cell.layer.p99_ms / 2, rel=1e-6)


def test_memory_too_small_for_the_model_fails_with_a_sentence(spec, requests, replay_for):
    with pytest.raises(RunFailed, match="use more GPUs or fewer extra slots"):
        run(spec, requests, replay_for, pool=PoolSettings(expert_bytes_G=(1.0,) * 4))


def test_warm_up_leaves_layer_figures_but_not_bills(spec, requests, replay_for):
    whole = run(spec, requests, replay_for)
    later = run(spec, requests, replay_for, warmup_iterations=10)
    assert later.cell.layer.samples == whole.cell.layer.samples - 10 * spec.L
    assert dataclasses.asdict(later.cell.billing) == pytest.approx(dataclasses.asdict(whole.cell.billing))


@pytest.mark.parametrize("more", [0, 1000])
def test_a_warm_up_that_takes_the_whole_run_fails_with_a_sentence(spec, requests, replay_for, more):
    all_of_it = run(spec, requests, replay_for).record.iterations
    assert run(spec, requests, replay_for, warmup_iterations=all_of_it - 1).cell.layer.samples == spec.L
    with pytest.raises(RunFailed, match="warm-up took all of it"):
        run(spec, requests, replay_for, warmup_iterations=all_of_it + more)


def test_one_second_batches_that_pile_up_have_no_request_metrics(spec, topk, replay_for):
    requests = [Request(i, 0.001 * i, 8, 13, trace_request=i) for i in range(40)]
    got = run(spec, requests, replay_for, scheduler=OneSecond(requests, 4, period=0.001))
    # a millisecond's batch takes longer than a millisecond, but not for the second that counts as piled up
    assert got.cell.request is not None
    slow = cluster("cpu8").with_gpus(4)
    runtime = resolve(
        Policy("static"), spec=spec, cluster=slow, costs=COSTS.get("roofline")(spec, slow), extra_slots=0, predictors={}
    )
    piled = simulate(
        replay_for(4), requests, OneSecond(requests, 4, period=0.001), runtime, settings=SimulationSettings()
    )
    assert piled.cell.request is None
    assert any("pile up" in warning for warning in piled.cell.warnings)


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ("moeless:nonesuch", "no predictor 'nonesuch'"),
        ("static:history", "needs no forecast"),
        ("oracle:history", "takes no predictor"),
        ("magic", "no planner is called 'magic'"),
    ],
)
def test_wrong_policies_are_one_sentence(policy, sentence, spec, requests, replay_for):
    with pytest.raises(UserError, match=sentence):
        run(spec, requests, replay_for, policy)


def test_rows_and_experts_that_do_not_exist_are_refused(spec, topk, replay_for):
    with pytest.raises(UserError, match="rows that the trace does not have"):
        replay_for(4, topk, [Request(0, 0.0, 20, 9, trace_request=39)])
    with pytest.raises(UserError, match="expert 8 of a model with 8"):
        replay_for(4, topk + 1)


def test_perfect_balance_equals_the_lower_bound(spec, replay_for):
    """Every expert gets one token of each source: no plan can beat static EP, and the simulator says the bound."""
    from moeless.placement.bound import layer_bound

    # request i's tokens walk through all experts, two at a time
    topk = np.empty((800, spec.L, 2), np.uint16)
    topk[:, :, 0] = (2 * np.arange(800) % 8)[:, None]
    topk[:, :, 1] = topk[:, :, 0] + 1
    requests = [Request(i, 0.0, 8, 1, trace_request=i) for i in range(4)]
    got = run(spec, requests, lambda g: replay_for(g, topk, requests), scheduler=Continuous(requests, 4))
    assert got.cell.layer.samples == spec.L
    assert got.cell.layer.imbalance == 1.0
    where = cluster("h100x8").with_gpus(4)
    costs = COSTS.get("roofline")(spec, where)
    bound = layer_bound(np.full(8, 8, np.int64), costs.terms(), 4)
    # the exchange in the bound lets all tokens travel; a quarter of these stay where they are
    terms = costs.terms()
    assert got.cell.layer.parts_ms["expert"] == pytest.approx(
        1e3 * (2 * max(8 * terms.token_seconds, terms.floor_seconds) + terms.launch_seconds), rel=1e-6
    )
    assert got.cell.layer.mean_ms <= 1e3 * bound * (1 + 1e-9)
    assert got.cell.layer.mean_ms >= 1e3 * (bound - 2 * 16 * terms.link_seconds)
