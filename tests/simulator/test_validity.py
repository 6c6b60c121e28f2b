"""Each of a row's warnings about itself, provoked once and absent otherwise."""

from dataclasses import replace

import numpy as np
import pytest

from moeless.cluster import cluster
from moeless.contracts import Policy
from moeless.costs import COSTS
from moeless.metrics.requests import RequestTimes, request_metrics
from moeless.policy import resolve
from moeless.simulator import SimulationSettings
from moeless.simulator.gpu_pool import GpuPool
from moeless.simulator.serving_loop import serve_pools
from moeless.simulator.tenants import Tenant
from moeless.simulator.validity import check_validity
from moeless.workloads.scheduler import Queueing
from moeless.workloads.schedulers import Continuous, OneSecond


def figures(count, failed=0):
    at_N, ones_N = np.arange(count, dtype=np.float64), np.ones(count, np.int64)
    times = RequestTimes(at_N, at_N + 0.1, at_N + 0.2, ones_N, ones_N + 1, np.full(count, 0.1), ones_N)
    return request_metrics(times, duration=float(count), failed=failed)


def said(kind=Continuous, waits=(), busy=0.5, count=200, samples=1000, failed=0, **more):
    scheduler = object.__new__(kind)
    scheduler.queueing = lambda: Queueing.judge(waits)
    kept, warnings = check_validity(figures(count, failed), scheduler, samples=samples, busy_fraction=busy, **more)
    return kept, " ".join(warnings)


def test_nothing_is_said_of_a_calm_run():
    kept, warnings = said(waits=[0.01] * 40)
    assert warnings == ""
    assert kept is not None


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"waits": np.linspace(0.0, 9.0, 40)}, "the queue grew over the run"),
        ({"waits": [0.5] * 40, "busy": 0.99}, "busy 99 % of the time: near saturation"),
        ({"count": 20}, "only 20 requests: a p99 of fewer than 100 is one observation"),
        ({"samples": 30}, "only 30 layer samples"),
        ({"failed": 3}, "3 requests were not completed"),
    ],
)
def test_what_weakens_request_figures_is_said(asked, sentence):
    kept, warnings = said(**asked)
    assert sentence in warnings
    assert kept is not None


def test_growing_waits_of_one_second_batches_leave_no_request_figures():
    kept, warnings = said(OneSecond, waits=np.linspace(0.0, 9.0, 40))
    assert kept is None
    assert "one-second batches pile up: request metrics are undefined" in warnings


def test_waiting_for_a_cold_start_is_no_queue_but_waiting_longer_is():
    waits = [0.0] * 30 + [1.5] * 10
    assert "queue grew" in said(waits=waits)[1]
    assert said(waits=waits, cold_start_seconds=1.5)[1] == ""
    assert "queue grew" in said(waits=[0.0] * 30 + [4.0] * 10, cold_start_seconds=1.5)[1]


def run_with(memory_bytes, spec, requests, replay):
    where = cluster("h100x8").with_gpus(4)
    where = replace(where, device=replace(where.device, memory_bytes=memory_bytes))
    costs = COSTS.get("roofline")(spec, where)
    runtime = resolve(Policy("static"), spec=spec, cluster=where, costs=costs, extra_slots=0, predictors={})
    return Tenant(replay, requests, Continuous(requests, 4), runtime, SimulationSettings(), None, None, None)


def test_caches_that_exceed_memory_and_copies_without_room_are_said(spec, requests, replay_for):
    together = [replace(request, arrival=0.0) for request in requests]
    weights = spec.L * spec.E / 4 * spec.expert_bytes + spec.non_expert_bytes
    wide, tight = (run_with(room, spec, together, replay_for(4)) for room in (2 * weights, weights))
    for run in (wide, tight):
        serve_pools(GpuPool([run]))
    assert wide.remarks() == []
    [overflow] = tight.remarks()
    assert "experts and KV cache exceeded a GPU's memory by up to" in overflow
    # one more copy, where the caches left no room
    tight.instances.share_memory(np.full(4, 1.0), tight.now)
    tight.instances.provision(
        0, np.array([0, *range(8)], np.int32), np.array([3, 0, 0, 1, 1, 2, 2, 3, 3], np.int32), tight.now
    )
    assert any("memory had no room for 1 planned copies" in remark for remark in tight.remarks())
