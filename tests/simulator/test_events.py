"""Failures, idle times, timelines, sweeps."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from moeless.cluster import cluster
from moeless.contracts import LayerPlan, Policy, Request
from moeless.costs import COSTS
from moeless.errors import RunFailed, UserError
from moeless.policy import resolve
from moeless.predictors import LoadPredictor
from moeless.serverless import KeepAlive, PoolSettings
from moeless.simulator import SimulationSettings, simulate
from moeless.simulator.failures import Failure, Outage
from moeless.simulator.timeline import Timeline
from moeless.workloads.schedulers import Continuous


class Even(LoadPredictor):
    """Forecasts equal shares, except that the first expert is hot in every other call."""

    name, calls = "even", 0

    def __init__(self):
        pass

    def predict(self, context, layer, distance):
        from moeless.contracts import Forecast

        self.calls += 1
        mean = np.ones(8)
        mean[self.calls % 8] = 6.0
        mean *= context.tokens * 2 / mean.sum()
        return Forecast(mean, mean.copy(), context.tokens, "even")


def run(spec, requests, replay, policy, timeline=None, scheduler=None, costs="roofline", **settings):
    where = cluster("h100x8").with_gpus(4)
    runtime = resolve(
        Policy.parse(policy),
        spec=spec,
        cluster=where,
        costs=COSTS.get(costs)(spec, where),
        extra_slots=2,
        predictors={"even": Even()},
    )
    scheduler = scheduler or Continuous(requests, 4, token_budget=64)
    return simulate(replay, requests, scheduler, runtime, settings=SimulationSettings(**settings), timeline=timeline)


@pytest.mark.parametrize("policy", ["static", "eplb:history", "moeless:even:1", "elastic:even:1"])
@pytest.mark.parametrize("restart", [0.005, 100.0])
def test_a_lost_gpu_loses_no_request_and_counts_none_twice(policy, restart, spec, requests, replay_for):
    requests = [dataclasses.replace(request, arrival=0.0) for request in requests]
    whole = run(spec, requests, replay_for(4), policy)
    failure = Failure(0.4 * whole.end, 1, restart_seconds=restart, detection_seconds=0.001)
    broken = run(spec, requests, replay_for(4), policy, failures=(failure,))
    for name in ("completed", "total_output_tokens", "total_input_tokens"):
        assert getattr(broken.cell.request, name) == getattr(whole.cell.request, name)
    assert broken.cell.request.failed == 0
    assert broken.end > whole.end
    stalls = broken.cell.layer.stalls
    assert stalls["recovery"] > 0
    assert stalls["failure"] >= 0.001
    assert any("lost their KV cache" in warning for warning in broken.cell.warnings)


def test_a_dead_copy_is_loaded_again_and_only_its_stall_is_charged(spec, requests, replay_for):
    whole = run(spec, requests, replay_for(4), "static")
    dead = Failure(0.3 * whole.end, 0, layer=1, expert=0, detection_seconds=0.0)
    broken = run(spec, requests, replay_for(4), "static", failures=(dead,))
    assert broken.cell.layer.moved_bytes == spec.expert_bytes
    assert broken.cell.request.total_output_tokens == whole.cell.request.total_output_tokens
    assert "recovery" not in broken.cell.layer.stalls


def test_losing_the_last_gpu_fails_the_run(spec, requests, replay_for):
    lost = tuple(Failure(0.001, gpu) for gpu in range(4))
    with pytest.raises(RunFailed, match="last GPU was lost"):
        run(spec, requests, replay_for(4), "static", failures=lost)


def test_evacuation_leaves_lost_gpus_and_keeps_one_primary_of_every_expert():
    plan = LayerPlan.build(
        0, [0, 1, 2, 3, 0, 3], [0, 0, 1, 1, 1, 2], [True] * 4 + [False] * 2, num_experts=4, num_gpus=3
    )
    outage = Outage(3)
    outage.lose(0, 9.0)
    there = outage.evacuate(plan)
    assert 0 not in there.gpu_R
    # expert 0 keeps its copy on GPU 1, expert 1 moves to the GPU with fewest copies
    assert there.gpu_R[(there.expert_R == 0)].tolist() == [1]
    assert there.gpu_R[(there.expert_R == 1)].tolist() == [2]
    assert outage.returned(8.0) == []
    assert outage.returned(9.0) == [0]
    assert outage.evacuate(plan) is plan


def test_evacuation_hands_a_lost_copy_s_share_to_those_that_are_left():
    expert, gpu = [0, 1, 2, 0, 0, 1, 2], [0, 0, 1, 1, 2, 2, 2]
    share = [0.5, 0.0, 0.25, 0.125, 0.375, 1.0, 0.75]
    plan = LayerPlan.build(0, expert, gpu, [True] * 3 + [False] * 4, num_experts=3, num_gpus=4, share_R=share)
    outage = Outage(4)
    outage.lose(2, 9.0)
    there = outage.evacuate(plan)
    there.validate(num_experts=3, num_gpus=4)
    found = {(e, g): s for e, g, s in zip(there.expert_R.tolist(), there.gpu_R.tolist(), there.share_R, strict=True)}
    # of expert 1 nothing is left that had a share: its primary serves
    assert found == {(0, 0): 0.8, (0, 1): 0.2, (1, 0): 1.0, (2, 1): 1.0}
    assert not there.decides
    outage.lose(0, 9.0)
    again = outage.evacuate(plan)
    again.validate(num_experts=3, num_gpus=4)
    assert again.share_R is not None
    assert again.num_extra == 0


@pytest.mark.parametrize("text", ["5", "x:1", "1:2:3:4", "-1:0", "1:0:0"])
def test_bad_failures_are_one_sentence(text):
    with pytest.raises(UserError, match="GPU"):
        Failure.parse(text)


def test_scale_to_zero_saves_gpu_time_and_costs_a_cold_start(spec, requests, replay_for):
    apart = [dataclasses.replace(request, arrival=40.0 * i) for i, request in enumerate(requests[:3])]
    pool = PoolSettings(keep_alive=KeepAlive("fixed", 5.0), scale_to_zero=True, container_seconds=1.0)
    stay = run(spec, apart, replay_for(4, chosen=apart), "moeless:even:1")
    sleep = run(spec, apart, replay_for(4, chosen=apart), "moeless:even:1", pool=pool)
    assert sleep.cell.billing.gpu_seconds < 0.4 * stay.cell.billing.gpu_seconds
    assert sleep.cell.billing.resident < 0.4 * stay.cell.billing.resident
    assert sleep.cell.request.mean_ttft_ms > stay.cell.request.mean_ttft_ms + 600
    assert sleep.cell.layer.stalls["container"] == pytest.approx(2 * sleep.pool.wake_seconds)
    assert sleep.cell.layer.stalls["wake"] > 0
    assert sleep.cell.request.completed == 3


def test_a_cold_start_is_no_growing_queue(spec, requests, replay_for):
    # three together at once, one after a long silence: its wait is the container's
    apart = [dataclasses.replace(request, arrival=(0.0, 0.0, 0.0, 60.0)[i]) for i, request in enumerate(requests[:4])]
    pool = PoolSettings(keep_alive=KeepAlive("fixed", 5.0), scale_to_zero=True, container_seconds=2.0)
    got = run(spec, apart, replay_for(4, chosen=apart), "moeless:even:1", pool=pool)
    assert got.cell.layer.stalls["container"] > 2.0
    assert not any("queue grew" in warning for warning in got.cell.warnings)


def test_late_plans_are_counted_and_early_ones_are_not(spec, requests, replay_for):
    def warnings(distance):
        return run(spec, requests, replay_for(4), f"moeless:even:{distance}").cell.warnings

    # 50 µs of forecast and planning against a layer of some 25 µs
    assert any("came after their layer" in warning for warning in warnings(1))
    assert not any("came after their layer" in warning for warning in warnings(3))


def test_one_server_with_constant_service_waits_as_long_as_m_d_1_says(spec, topk, replay_for, one_by_one):
    """Pollaczek-Khinchine with constant service D and utilisation u: mean wait u·D / (2·(1 − u))."""
    probe = Request(0, 0.0, 1, 1, trace_request=0)
    same = np.broadcast_to(topk[:1], topk.shape)
    service = run(spec, [probe], replay_for(4, same, [probe]), "static", scheduler=one_by_one([probe])).end
    random, u, count = np.random.default_rng(5), 0.6, 20_000
    arrivals = np.cumsum(random.exponential(service / u, count))
    requests = [Request(i, float(t), 1, 1, trace_request=0) for i, t in enumerate(arrivals)]
    got = run(spec, requests, replay_for(4, same, requests), "static", scheduler=one_by_one(requests))
    expected = service * (1 + u / (2 * (1 - u)))
    assert got.cell.request.mean_ttft_ms == pytest.approx(1e3 * expected, rel=0.05)
    # what Lindley's recursion says for these very arrivals
    wait, total = 0.0, 0.0
    for gap in np.diff(arrivals, prepend=arrivals[0]):
        wait = max(0.0, wait + service - gap) if total else 0.0
        total += wait + service
    assert got.cell.request.mean_ttft_ms == pytest.approx(1e3 * total / count, rel=1e-6)


@pytest.mark.parametrize("start_seconds", [0.0, 0.0005])
def test_timeline_is_a_chrome_trace_whose_events_nest(start_seconds, spec, requests, replay_for, tmp_path):
    timeline, pool = Timeline(0.0, 0.02), PoolSettings(KeepAlive("fixed", 0.0), start_seconds=start_seconds)
    run(spec, requests, replay_for(4), "moeless:even:1", timeline=timeline, pool=pool)
    count = timeline.write(tmp_path / "timeline.json")
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    assert count > 50
    spans = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
    for track in {(event["pid"], event["tid"]) for event in spans}:
        mine = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if (e["pid"], e["tid"]) == track)
        for (_, end), (begin, _) in itertools.pairwise(mine):
            assert begin >= end - 1e-3
    assert {event["pid"] for event in spans} == {1, 2}


def test_watching_a_window_changes_nothing(spec, requests, replay_for):
    plain = run(spec, requests, replay_for(4), "static")
    watched = run(spec, requests, replay_for(4), "static", timeline=Timeline(0.005, 0.01))
    assert watched.end == pytest.approx(plain.end, rel=1e-9)
    assert watched.cell.layer.samples == plain.cell.layer.samples


def test_a_busy_batch_counts_as_saturated_only_where_requests_wait(spec, requests, replay_for):
    together = [dataclasses.replace(request, arrival=0.0) for request in requests]

    def said(limit):
        scheduler = Continuous(together, 4, token_budget=64, max_running=limit)
        return " ".join(run(spec, together, replay_for(4), "static", scheduler=scheduler).cell.warnings)

    # everything starts at once and is served within milliseconds: busy, nobody waits noticeably
    assert "near saturation" not in said(40)
    slow = dataclasses.replace(cluster("cpu8"), num_gpus=4)
    runtime = resolve(
        Policy("static"), spec=spec, cluster=slow, costs=COSTS.get("roofline")(spec, slow), extra_slots=0, predictors={}
    )
    scheduler = Continuous(together, 4, token_budget=64, max_running=2)
    got = simulate(replay_for(4), together, scheduler, runtime, settings=SimulationSettings())
    assert any("near saturation" in text or "queue grew" in text for text in got.cell.warnings)
