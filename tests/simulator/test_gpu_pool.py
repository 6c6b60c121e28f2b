"""Several models on one set of GPUs."""

from __future__ import annotations

import dataclasses
import math

import pytest

from moeless.cluster import cluster
from moeless.contracts import Policy, Request
from moeless.costs import COSTS
from moeless.errors import RunFailed, UserError
from moeless.policy import resolve
from moeless.serverless import PoolSettings
from moeless.simulator import SimulationSettings, simulate
from moeless.simulator.gpu_pool import GpuPool
from moeless.simulator.serving_loop import serve_pools
from moeless.simulator.tenants import Tenant
from moeless.workloads.schedulers import Continuous, OneSecond


def runtime_for(spec, memory=None):
    where = cluster("h100x8").with_gpus(4)
    if memory is not None:
        where = dataclasses.replace(where, device=dataclasses.replace(where.device, memory_bytes=memory))
    costs = COSTS.get("roofline")(spec, where)
    return resolve(Policy("static"), spec=spec, cluster=where, costs=costs, extra_slots=0, predictors={})


def tenant(spec, requests, replay, topk, shift=0.0, memory=None):
    moved = [dataclasses.replace(request, arrival=request.arrival + shift) for request in requests]
    scheduler = Continuous(moved, 4, token_budget=64, max_running=8)
    settings = SimulationSettings(PoolSettings())
    return Tenant(replay(4, topk, moved), moved, scheduler, runtime_for(spec, memory), settings, None, None, None)


@pytest.fixture
def few():
    return [Request(i, 0.01 * i, 8, 13, trace_request=i) for i in range(10)]


def weights_per_gpu(spec):
    return spec.L * spec.E / 4 * spec.expert_bytes + spec.non_expert_bytes


def test_a_tenant_alone_is_served_as_without_a_pool(spec, few, replay_for, topk):
    pool = GpuPool([tenant(spec, few, replay_for, topk)])
    serve_pools(pool)
    alone = simulate(
        replay_for(4, topk, few),
        few,
        Continuous(few, 4, token_budget=64, max_running=8),
        runtime_for(spec),
        settings=SimulationSettings(PoolSettings()),
    )
    assert pool.now == alone.end
    assert (pool.tenants[0].record.times_IL == alone.record.times_IL).all()
    assert pool.gpu_seconds == 4 * alone.end


def test_tenants_take_turns_and_every_request_is_served_once(spec, few, replay_for, topk):
    pool = GpuPool([tenant(spec, few, replay_for, topk, shift) for shift in (0.0, 0.0, 0.003)])
    serve_pools(pool)
    for one in pool.tenants:
        assert one.clocks.completed == len(few)
        assert one.clocks.unfinished == 0
        assert one.wakes == 0
    # one iteration at a time: the GPUs' busy time is the sum of the tenants'
    assert sum(one.busy for one in pool.tenants) <= pool.now


def test_where_memory_holds_one_tenant_the_idle_one_makes_room(spec, few, replay_for, topk):
    memory = 1.5 * weights_per_gpu(spec)
    pool = GpuPool([tenant(spec, few, replay_for, topk, shift, memory) for shift in (0.0, 5.0)])
    assert [one.awake for one in pool.tenants] == [True, False]
    serve_pools(pool)
    assert [one.wakes for one in pool.tenants] == [0, 1]
    assert [one.awake for one in pool.tenants] == [False, True]
    assert all(one.clocks.completed == len(few) for one in pool.tenants)
    late = pool.tenants[1]
    loading = COSTS.get("roofline")(spec, late.cluster).load_seconds(spec.non_expert_bytes, "host", 0)
    assert late.clocks.times().ttft_N[0] > loading
    # the first tenant's copies are billed until they leave, the second's from then on
    assert pool.resident_byte_seconds <= spec.L * spec.E * spec.expert_bytes * pool.now * 1.001


def test_overlapping_tenants_without_room_wait_for_each_other(spec, few, replay_for, topk):
    memory = 1.5 * weights_per_gpu(spec)
    pool = GpuPool([tenant(spec, few, replay_for, topk, 0.0, memory) for _ in range(2)])
    serve_pools(pool)
    assert all(one.clocks.completed == len(few) for one in pool.tenants)
    assert pool.tenants[1].wakes >= 1


@pytest.mark.parametrize("patience", [0.0, 0.02, math.inf])
def test_a_sleeping_tenant_is_not_starved_by_one_that_always_has_work(patience, spec, replay_for, topk):
    # the first tenant's requests overlap from beginning to end; the second has a single one, early
    busy = [Request(i, 0.0005 * i, 8, 13, trace_request=i % 40) for i in range(400)]
    one = [Request(0, 0.01, 8, 13, trace_request=0)]
    memory = 1.5 * weights_per_gpu(spec)
    pool = GpuPool([tenant(spec, r, replay_for, topk, 0.0, memory) for r in (busy, one)], patience)
    serve_pools(pool)
    first, second = (each.clocks for each in pool.tenants)
    assert (first.completed, second.completed) == (400, 1)
    ended = second.times().last_token_N[0]
    if math.isinf(patience):
        assert pool.memory.drains == 0
        assert ended > first.times().last_token_N.max()
    else:
        # patience, the running requests' ends, loading, its own tokens
        assert pool.memory.drains >= 1
        assert ended < 0.01 + patience + 0.1 < first.times().last_token_N.max()
        assert [each.wakes for each in pool.tenants] == [1, 1]


def test_impatient_tenants_that_all_have_work_still_get_on(spec, few, replay_for, topk):
    memory = 1.5 * weights_per_gpu(spec)
    pool = GpuPool([tenant(spec, few, replay_for, topk, 0.0, memory) for _ in range(3)], 0.0)
    serve_pools(pool)
    assert all(one.clocks.completed == len(few) for one in pool.tenants)
    assert pool.memory.drains >= 2


def test_pools_that_cannot_be_are_one_sentence(spec, few, replay_for, topk):
    with pytest.raises(UserError, match="at least one tenant"):
        GpuPool([])
    with pytest.raises(RunFailed, match="use more GPUs"):
        GpuPool([tenant(spec, few, replay_for, topk, 0.0, 0.5 * weights_per_gpu(spec) + spec.non_expert_bytes)])
    batches = [
        Tenant(
            replay_for(4, topk, few), few, OneSecond(few, 4), runtime_for(spec), SimulationSettings(), None, None, None
        )
        for _ in range(2)
    ]
    with pytest.raises(UserError, match="patience"):
        GpuPool([tenant(spec, few, replay_for, topk)], -1.0)
    with pytest.raises(UserError, match="continuous batching"):
        GpuPool(batches)
