"""The queue of timed events, and several pools of GPUs that it serves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import Request
from moeless.serverless import KeepAlive, PoolSettings
from moeless.simulator import SimulationSettings
from moeless.simulator.events import Event, EventQueue, Kind
from moeless.simulator.failures import Failure
from moeless.simulator.gpu_pool import GpuPool
from moeless.simulator.serving_loop import serve_pools
from moeless.simulator.tenants import Tenant
from moeless.workloads.schedulers import Continuous
from tests.simulator.conftest import runtime_of


def drain(queue):
    found = []
    while (event := queue.pop()) is not None:
        found.append(event.subject)
    return found


def test_events_come_by_time_then_kind_then_in_the_order_of_scheduling():
    queue = EventQueue()
    planned = [(2.0, Kind.FAILURE), (1.0, Kind.TURN), (1.0, Kind.ARRIVAL), (1.0, Kind.GPU_BACK), (1.0, Kind.ARRIVAL)]
    for place, (seconds, kind) in enumerate(planned):
        Event(queue, kind, None, place).schedule(seconds)
    assert queue.next_time() == 1.0
    assert queue.next_time(before=0.5) == 0.5
    assert drain(queue) == [3, 2, 4, 1, 0]
    assert queue.next_time() == math.inf
    assert queue.next_time(before=3.0) == 3.0


def test_an_event_may_happen_again_and_tells_when_it_last_did():
    queue = EventQueue()
    event = Event(queue, Kind.ARRIVAL, None, "first")
    assert not event.waiting
    for seconds in (1.0, 1.0, 2.0):
        event.schedule(seconds)
        assert event.waiting
        assert queue.pop() is event
        assert not event.waiting
        assert event.seconds == seconds
    assert queue.pop() is None


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 1.0, 2.0, 3.0, math.inf])), max_size=40))
def test_only_where_an_event_was_scheduled_last_does_it_happen(steps):
    queue, last = EventQueue(), {}
    events = [Event(queue, Kind.ARRIVAL, None, number) for number in range(5)]
    for number, seconds in steps:
        events[number].schedule(seconds)
        last[number] = seconds
    finite = {number: seconds for number, seconds in last.items() if seconds < math.inf}
    assert queue.next_time() == min(finite.values(), default=math.inf)
    found = drain(queue)
    assert sorted(found) == sorted(finite)
    assert [finite[number] for number in found] == sorted(finite.values())


def test_pools_on_one_queue_serve_as_each_alone(spec, topk, replay_of):
    where = cluster("h100x8").with_gpus(4)
    pool = {"keep_alive": KeepAlive("fixed", 0.05), "container_seconds": 0.02}
    kinds = [
        ("static", {}, (Failure(0.01, 1, restart_seconds=0.2, detection_seconds=0.005),)),
        ("moeless:last:1", {"scale_to_zero": True, "requests_per_gpu": 2, **pool}, ()),
    ]

    def make(number, queue):
        policy, how, broken = kinds[number]
        asked = [Request(i, (0.003 + 0.001 * number) * i + 0.3 * (i > 20), 8, 13, trace_request=i) for i in range(30)]
        settings = SimulationSettings(PoolSettings(**how), failures=broken)
        runtime, replay = runtime_of(policy, spec, where), replay_of(4, topk, asked)
        return GpuPool([Tenant(replay, asked, Continuous(asked, 4), runtime, settings, None, None, None)], queue=queue)

    queue = EventQueue()
    together, alone = [make(number, queue) for number in (0, 1)], [make(number, None) for number in (0, 1)]
    serve_pools(*together)
    for one, other in zip(together, alone, strict=True):
        serve_pools(other)
        mine, its = (each.tenants[0] for each in (one, other))
        assert mine.record.stalls == pytest.approx(its.record.stalls)
        for column in ("first_token_N", "last_token_N"):
            assert getattr(mine.clocks.times(), column) == pytest.approx(getattr(its.clocks.times(), column), rel=1e-12)
