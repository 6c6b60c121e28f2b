"""Whatever breaks, and whenever: every request gets every token once."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import Policy
from moeless.costs import COSTS
from moeless.errors import RunFailed
from moeless.policy import resolve
from moeless.serverless import KeepAlive, PoolSettings
from moeless.simulator import SimulationSettings, simulate
from moeless.simulator.failures import Failure
from moeless.workloads.schedulers import Continuous, OneSecond
from tests.simulator.conftest import losses, runtime_of

GPUS = 4
#: How the requests are batched; the last three make prompts and decoding requests take turns and wait.
BATCHING = {
    "one-second": lambda requests: OneSecond(requests, GPUS, period=0.004),
    "continuous": lambda requests: Continuous(requests, GPUS),
    "chunks": lambda requests: Continuous(requests, GPUS, token_budget=5, max_running=7),
    "apart": lambda requests: Continuous(requests, GPUS, token_budget=16, priority="prefill", mixed=False),
    "turns": lambda requests: Continuous(requests, GPUS, token_budget=3, priority="decode"),
}


@pytest.mark.parametrize("policy", ["static", "eplb:history", "moeless:last:1", "elastic:last:1"])
@settings(max_examples=15, deadline=None)
@given(
    broken=losses(1, GPUS, most=4, seconds=0.06),
    batching=st.sampled_from(sorted(BATCHING)),
    gap=st.sampled_from([0.0, 0.001, 0.003]),
)
def test_no_request_is_lost_or_counted_twice(policy, broken, batching, gap, spec, topk, requests, replay_of):
    asked = [
        dataclasses.replace(request, arrival=gap * request.id, output_tokens=1 + request.id % 9)
        for request in requests[:24]
    ]
    where = cluster("h100x8").with_gpus(GPUS)
    runtime = runtime_of(policy, spec, where)
    got = simulate(
        replay_of(GPUS, topk, asked),
        asked,
        BATCHING[batching](asked),
        runtime,
        settings=SimulationSettings(
            PoolSettings(keep_alive=KeepAlive("fixed", 0.002)), replan_seconds=0.01, failures=broken
        ),
    )
    times = got.clocks.times()
    assert got.clocks.unfinished == 0
    assert times.output_tokens_N.tolist() == [request.output_tokens for request in asked]
    assert times.input_tokens_N.tolist() == [request.prompt_tokens for request in asked]
    # every token after a request's first one is one gap
    assert times.itl_count_I.sum() == sum(request.output_tokens - 1 for request in asked)
    assert (times.itl_seconds_I >= 0).all()
    assert (times.ttft_N > 0).all()
    assert (times.e2el_N >= times.ttft_N).all()
    assert got.end >= times.last_token_N.max()


def _serve(spec, topk, replay_of, asked, broken, expert_bytes_G=None, **pool):
    where = cluster("h100x8").with_gpus(GPUS)
    runtime = resolve(
        Policy.parse("static"),
        spec=spec,
        cluster=where,
        costs=COSTS.get("roofline")(spec, where),
        extra_slots=0,
        predictors={},
    )
    how = SimulationSettings(PoolSettings(expert_bytes_G=expert_bytes_G, **pool), failures=broken)
    return simulate(replay_of(GPUS, topk, asked), asked, Continuous(asked, GPUS), runtime, settings=how)


@pytest.fixture(scope="session")
def gap(requests):
    """Four requests at once, and four more after 100 s of silence."""
    return [dataclasses.replace(request, arrival=0.0 if request.id < 4 else 100.0) for request in requests[:8]]


def test_what_breaks_in_silence_breaks_then_and_nobody_waits_for_it(gap, spec, topk, replay_of):
    broken = (Failure(20.0, 1, restart_seconds=30.0), Failure(60.0, 0, layer=1, expert=0))
    got = _serve(spec, topk, replay_of, gap, broken)
    # both were noticed, the GPU was back and filled again, the copy reloaded, long before anybody came
    assert got.cell.layer.stalls == {"cold": 0.0, "failure": 0.0}
    assert got.pool.moved_bytes > 0
    whole = _serve(spec, topk, replay_of, gap, ())
    assert got.end == pytest.approx(whole.end)
    # a loss shortly before an arrival is waited for from the arrival on
    late = _serve(spec, topk, replay_of, gap, (Failure(99.8, 1, detection_seconds=0.5),))
    assert late.cell.layer.stalls["failure"] >= 0.3 - 1e-9
    assert late.cell.layer.stalls["failure"] < 0.35
    assert late.cell.request.completed == 8


def test_a_gpu_that_comes_back_in_silence_is_filled_before_anybody_asks(gap, spec, topk, replay_of):
    got = _serve(spec, topk, replay_of, gap, (Failure(20.0, 1, restart_seconds=30.0),))
    assert got.cell.layer.stalls == {"cold": 0.0, "failure": 0.0}
    assert got.end == _serve(spec, topk, replay_of, gap, ()).end
    assert np.isfinite(got.pool.born_LEG[:, :, 1]).any()


def test_gpus_given_back_are_not_lost(gap, spec, topk, replay_of):
    pool = {"keep_alive": KeepAlive("fixed", 5.0), "scale_to_zero": True, "container_seconds": 1.0}
    whole = _serve(spec, topk, replay_of, gap, (), **pool)
    away = _serve(spec, topk, replay_of, gap, (Failure(50.0, 1, restart_seconds=1000.0),), **pool)
    assert away.end == whole.end
    assert any("had been given back" in text for text in away.cell.warnings)
    # one lost before that is not among those that are taken again
    before = _serve(spec, topk, replay_of, gap, (Failure(2.0, 1, restart_seconds=1000.0),), **pool)
    assert before.end == pytest.approx(whole.end)
    assert not before.pool.down_G.any()
    assert before.cell.billing.gpu_seconds == pytest.approx(whole.cell.billing.gpu_seconds)


def test_copies_that_survivors_have_no_room_for_are_not_served_from(requests, spec, topk, replay_of):
    room = (7.0 * spec.expert_bytes,) * GPUS
    with pytest.raises(RunFailed, match="no room"):
        _serve(spec, topk, replay_of, requests[:8], (Failure(0.001, 1),), room)
