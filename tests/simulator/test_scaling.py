"""GPUs that are given back one by one while others go on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import Request
from moeless.errors import UserError
from moeless.serverless import KeepAlive, PoolSettings
from moeless.simulator import SimulationSettings, simulate
from moeless.simulator.failures import Failure
from moeless.workloads.schedulers import Continuous
from tests.simulator.conftest import runtime_of

GPUS = 4


@pytest.fixture(scope="session")
def serve(spec, topk, replay_of):
    def run(asked, policy="moeless:last:1", broken=(), memory=None, **pool):
        where = cluster("h100x8").with_gpus(GPUS)
        if memory is not None:
            where = dataclasses.replace(where, device=dataclasses.replace(where.device, memory_bytes=memory))
        runtime = runtime_of(policy, spec, where)
        how = SimulationSettings(PoolSettings(**pool), failures=tuple(broken))
        return simulate(
            replay_of(GPUS, topk, asked), asked, Continuous(asked, GPUS, token_budget=32), runtime, settings=how
        )

    return run


def trickle(count=40, gap=0.01, output=13):
    return [Request(i, gap * i, 8, output, trace_request=i % 40) for i in range(count)]


def everything(spec, gpus):
    """Bytes of a GPU that holds an equal share of all experts, one extra a layer and the other weights."""
    return spec.L * (-(-spec.E // gpus) + 1) * spec.expert_bytes + spec.non_expert_bytes


POOL = {"keep_alive": KeepAlive("fixed", 0.05), "container_seconds": 0.02}


def test_under_low_load_gpus_are_given_back_and_the_others_go_on(serve):
    asked = trickle()
    whole = serve(asked, **POOL)
    fewer = serve(asked, **POOL, requests_per_gpu=4)
    assert fewer.cell.request.completed == len(asked)
    assert whole.cell.billing.gpu_seconds == pytest.approx(GPUS * whole.end)
    # one GPU but for the first keep-alive and the time its copies take
    assert fewer.pool.held_G.sum() == 1
    assert fewer.cell.billing.gpu_seconds < (1.0 * fewer.end + 3 * 0.08)
    assert fewer.cell.billing.gpu_seconds > (1.0 * fewer.end + 3 * 0.05)
    # copies were loaded before their GPU went
    assert fewer.cell.layer.stalls.get("leaving", 0.0) == 0.0
    assert fewer.pool.moved_bytes > 0
    assert fewer.cell.billing.resident < whole.cell.billing.resident


def test_more_requests_take_gpus_again_and_these_are_billed_from_then_on(serve):
    first = trickle(20, 0.02)
    burst = [Request(20 + i, 0.5, 8, 40 - 30, trace_request=i) for i in range(40)]
    last = [Request(60 + i, 0.6 + 0.02 * i, 8, 13, trace_request=i) for i in range(10)]
    asked = [*first, *burst, *last]
    got = serve(asked, **{**POOL, "container_seconds": 0.0005}, requests_per_gpu=4)
    assert got.cell.request.completed == len(asked)
    seconds = got.cell.billing.gpu_seconds
    assert seconds < 0.75 * GPUS * got.end
    # the burst had all of them for a keep-alive at least, on top of the one and of the first keep-alive
    assert seconds > got.end + 3 * 0.05 + 3 * 0.05
    assert got.pool.held_G.sum() == 1


@pytest.mark.parametrize(("fits", "held"), [(1, 1), (2, 2), (3, 3), (4, 4)])
def test_no_fewer_are_held_than_memory_needs(fits, held, serve, spec):
    memory = everything(spec, fits) + 200 * spec.kv_bytes_per_token
    got = serve(trickle(), memory=memory, **POOL, requests_per_gpu=1000)
    assert got.pool.held_G.sum() == held
    assert got.pool.kv_overflow_bytes == 0


def test_a_long_silence_gives_back_the_rest_and_as_many_start_again_as_are_needed(serve):
    asked = [*trickle(10), *[Request(10 + i, 50.0, 8, 13, trace_request=i) for i in range(6)]]
    got = serve(asked, **POOL, scale_to_zero=True, requests_per_gpu=4)
    assert got.cell.request.completed == 16
    assert got.cell.layer.stalls["container"] == pytest.approx(got.pool.wake_seconds)
    # nothing is held between; then two for the six
    assert got.cell.billing.gpu_seconds < 3.0
    after = got.end - 50.0
    assert got.pool.held_G.sum() == 2
    assert got.cell.billing.gpu_seconds > 2 * after + 4 * 0.05


def test_where_the_last_gpu_is_lost_another_is_taken(serve):
    asked = trickle(40)
    got = serve(asked, broken=[Failure(0.25, 0, restart_seconds=100.0, detection_seconds=0.01)], **POOL,
                requests_per_gpu=4)  # fmt: skip
    assert got.cell.request.completed == 40
    assert got.cell.layer.stalls["container"] > 0
    assert got.pool.held_G.tolist() == [False, True, False, False]
    # a GPU that is not held cannot be lost
    away = serve(asked, broken=[Failure(0.25, 3, restart_seconds=100.0)], **POOL, requests_per_gpu=4)
    assert away.end == serve(asked, **POOL, requests_per_gpu=4).end
    assert any("given back" in text for text in away.cell.warnings)


def test_where_the_last_gpu_is_lost_while_others_start_these_are_waited_for(serve):
    # at 0.4 s the burst has taken the three others, which are there at 0.5 s
    asked = [*trickle(40), *[Request(40 + i, 0.4, 8, 13, trace_request=i) for i in range(20)]]
    how = {**POOL, "container_seconds": 0.1, "requests_per_gpu": 4}
    got = serve(asked, broken=[Failure(0.4005, 0, restart_seconds=100.0, detection_seconds=0.001)], **how)
    assert got.cell.request.completed == 60
    assert got.cell.layer.stalls["container"] == pytest.approx(0.4 + 0.1 - 0.4015, abs=0.001)


@settings(max_examples=25, deadline=None)
@given(
    policy=st.sampled_from(["moeless:last:1", "elastic:last:1"]),
    gaps=st.lists(st.sampled_from([0.0, 0.0, 0.001, 0.01, 0.05, 0.3]), min_size=24, max_size=24),
    keep=st.sampled_from([0.0, 0.001, 0.02, 1.0]),
    per_gpu=st.sampled_from([0.5, 1, 3, 50]),
    zero=st.booleans(),
    container=st.sampled_from([0.0, 0.003, 0.1]),
    breaks=st.lists(
        st.tuples(st.floats(0.0, 0.5), st.integers(0, GPUS - 1), st.sampled_from([1e-3, 0.05, 100.0])), max_size=2
    ),
)
def test_no_request_is_lost_and_every_gpu_second_is_held_or_not(
    policy, gaps, keep, per_gpu, zero, container, breaks, serve
):
    asked = [Request(i, at, 8, 1 + i % 9, trace_request=i) for i, at in enumerate(np.cumsum([0.0, *gaps[1:]]).tolist())]
    got = serve(
        asked,
        policy,
        [Failure(seconds, gpu, restart_seconds=again, detection_seconds=0.001) for seconds, gpu, again in breaks],
        keep_alive=KeepAlive("fixed", keep),
        container_seconds=container,
        scale_to_zero=zero,
        requests_per_gpu=per_gpu,
    )
    times = got.clocks.times()
    assert times.output_tokens_N.tolist() == [request.output_tokens for request in asked]
    assert times.itl_count_I.sum() == sum(request.output_tokens - 1 for request in asked)
    assert (times.ttft_N > 0).all()
    assert 0 < got.cell.billing.gpu_seconds <= GPUS * got.end * (1 + 1e-9)


def test_bad_settings_are_one_sentence():
    with pytest.raises(UserError, match="must be above 0"):
        PoolSettings(requests_per_gpu=0.0)
