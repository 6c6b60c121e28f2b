"""Several models on one set of GPUs, of which single ones are given back and taken again."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import Request
from moeless.serverless import KeepAlive, PoolSettings
from moeless.simulator import SimulationSettings, simulate
from moeless.simulator.failures import Failure
from moeless.simulator.gpu_pool import GpuPool
from moeless.simulator.serving_loop import serve_pools
from moeless.simulator.tenants import Tenant
from moeless.workloads.schedulers import Continuous
from tests.simulator.conftest import losses, runtime_of

GPUS = 4
POOL = {"keep_alive": KeepAlive("fixed", 0.05), "container_seconds": 0.02, "requests_per_gpu": 4}


@pytest.fixture(scope="session")
def parts(spec, topk, replay_of):
    def make(asked, policy="moeless:last:1", broken=(), gpus_of_memory=8.0, **pool):
        """``gpus_of_memory``: a GPU's memory, in times of what the model takes of it when it has four."""
        where = cluster("h100x8").with_gpus(GPUS)
        memory = gpus_of_memory * (3 * spec.L * spec.expert_bytes + spec.non_expert_bytes)
        where = dataclasses.replace(where, device=dataclasses.replace(where.device, memory_bytes=memory))
        how = SimulationSettings(PoolSettings(**{**POOL, **pool}), failures=tuple(broken))
        scheduler = Continuous(asked, GPUS, token_budget=32)
        return replay_of(GPUS, topk, asked), asked, scheduler, runtime_of(policy, spec, where), how

    return make


@pytest.fixture(scope="session")
def tenant(parts):
    return lambda *args, **named: Tenant(*parts(*args, **named), None, None, None)


def ask(count, gap, start=0.0, output=13):
    return [Request(i, start + gap * i, 8, output, trace_request=i % 40) for i in range(count)]


def assert_each_token_came_once(run, asked):
    times = run.clocks.times()
    assert times.output_tokens_N.tolist() == [request.output_tokens for request in asked]
    assert times.itl_count_I.sum() == sum(request.output_tokens - 1 for request in asked)
    assert (times.ttft_N > 0).all()


@settings(max_examples=10, deadline=None)
@given(
    policy=st.sampled_from(["moeless:last:1", "elastic:last:1"]),
    gaps=st.lists(st.sampled_from([0.0, 0.0, 0.001, 0.01, 0.05, 0.3]), min_size=24, max_size=24),
    keep=st.sampled_from([0.0, 0.001, 0.02, 1.0]),
    per_gpu=st.sampled_from([0.5, 1, 3, 50]),
)
def test_one_model_in_a_pool_is_served_and_billed_as_without(parts, policy, gaps, keep, per_gpu):
    asked = [Request(i, at, 8, 1 + i % 9, trace_request=i) for i, at in enumerate(np.cumsum([0.0, *gaps[1:]]).tolist())]
    how = {"keep_alive": KeepAlive("fixed", keep), "requests_per_gpu": per_gpu}
    pool = GpuPool([Tenant(*parts(asked, policy, **how), None, None, None)])
    serve_pools(pool)
    *first, how = parts(asked, policy, **how)
    alone = simulate(*first, settings=how)
    assert pool.now == alone.end
    assert pool.gpu_seconds == alone.cell.billing.gpu_seconds
    assert pool.resident_byte_seconds == alone.pool.resident_byte_seconds(alone.end)
    assert (pool.tenants[0].record.times_IL == alone.record.times_IL).all()
    assert (pool.tenants[0].clocks.times().ttft_N == alone.clocks.times().ttft_N).all()


@settings(max_examples=15, deadline=None)
@given(
    policies=st.tuples(*[st.sampled_from(["moeless:last:1", "elastic:last:1"])] * 3),
    gap=st.sampled_from([0.0, 0.001, 0.01, 0.06]),
    keep=st.sampled_from([0.0, 0.001, 0.02, 1.0]),
    per_gpu=st.sampled_from([0.5, 1, 3, 50]),
    zero=st.booleans(),
    container=st.sampled_from([0.0, 0.003, 0.1]),
    memory=st.sampled_from([2.3, 4.0, 12.0]),
    patience=st.sampled_from([0.0, 0.01, 5.0]),
    broken=st.lists(losses(2, GPUS, most=2, seconds=0.3), max_size=2),
)
def test_no_request_is_lost_and_every_gpu_second_is_held_or_not(
    tenant, policies, gap, keep, per_gpu, zero, container, memory, patience, broken
):
    how = {"keep_alive": KeepAlive("fixed", keep), "container_seconds": container, "scale_to_zero": zero}
    asked = [
        [dataclasses.replace(request, output_tokens=1 + request.id % 9) for request in ask(8, gap, start)]
        for start in (0.0, 0.01, 0.5)
    ]
    broken = [*broken, (), (), ()][:3]
    runs = [
        tenant(a, policy, b, memory, requests_per_gpu=per_gpu, **how)
        for a, policy, b in zip(asked, policies, broken, strict=True)
    ]
    pool = GpuPool(runs, patience)
    serve_pools(pool)
    for run, requests in zip(runs, asked, strict=True):
        assert_each_token_came_once(run, requests)
    # an iteration has at least one GPU
    assert sum(run.busy for run in runs) * (1 - 1e-9) <= pool.gpu_seconds <= GPUS * pool.now * (1 + 1e-9)


def test_gpus_follow_the_load_of_all_models_together(tenant):
    # two requests of the first model at a time, of both for a while
    asked = [ask(40, 0.02), ask(10, 0.02)]
    asked = [[dataclasses.replace(request, arrival=0.04 * (request.id // 2)) for request in one] for one in asked]
    runs = [tenant(one, gpus_of_memory=12.0, requests_per_gpu=1) for one in asked]
    pool = GpuPool(runs)
    held = []
    iterate = pool._iterate
    pool._iterate = lambda one: held.append((pool.now, int(runs[0].instances.held_G.sum()))) or iterate(one)
    serve_pools(pool)
    assert {count for now, count in held if now < 0.17} == {4}
    assert {count for now, count in held if now > 0.3} == {2}
    # each model's pool kept the same account
    assert runs[1].instances.gpu_seconds(pool.now) == pool.gpu_seconds < 3.0 * pool.now


@pytest.mark.parametrize("models", [1, 2, 3])
def test_no_fewer_gpus_are_held_than_the_memory_of_all_models_needs(models, tenant, spec):
    asked = ask(12, 0.02)
    runs = [tenant(asked, gpus_of_memory=4.0, requests_per_gpu=1000) for _ in range(models)]
    pool = GpuPool(runs)
    serve_pools(pool)
    memory = runs[0].cluster.device.memory_bytes
    one_G = [spec.L * (-(-spec.E // gpus) + 1) * spec.expert_bytes + spec.non_expert_bytes for gpus in (1, 2, 3, 4)]
    fewest = 1 + next(i for i, one in enumerate(one_G) if models * one < memory)
    assert fewest == models
    assert runs[0].instances.held_G.sum() == fewest
    assert pool.memory.overflow_bytes == 0


def test_a_model_that_wakes_has_gpus_taken_for_its_memory_and_leaves_them_when_it_sleeps(tenant):
    always = ask(80, 0.01)
    once = [Request(0, 0.5, 8, 13, trace_request=0)]
    how = {"gpus_of_memory": 3.6, "requests_per_gpu": 1000, "scale_to_zero": True}
    runs = [tenant(asked, **how) for asked in (always, once)]
    pool = GpuPool(runs)
    moments = []
    hold = runs[0].instances.hold
    runs[0].instances.hold = lambda held_G, now: moments.append((float(now), int(held_G.sum()))) or hold(held_G, now)
    serve_pools(pool)
    first, second = pool.tenants
    assert (first.wakes, second.wakes) == (0, 1)
    # the second sleeps after a keep-alive, and with that its GPUs go
    assert not second.awake
    # the last are the account's
    assert [count for _, count in moments[:3]] == [1, 2, 1]
    (taken, _), (left, _) = moments[1:3]
    assert taken == 0.5
    # a container, its weights and its tokens, a keep-alive, and the time in which copies move
    assert 0.59 < left < 0.65
    assert {count for _, count in moments[3:]} == {1}
    # it waited for a container, for all its weights, for no patience
    assert 0.02 < runs[1].clocks.times().ttft_N[0] < 0.1
    assert pool.memory.drains == 0
    # the first went on meanwhile
    assert runs[0].clocks.times().ttft_N.max() < 0.01
    assert pool.gpu_seconds == pytest.approx(4 * 0.05 + 1.0 * (pool.now - 0.05) + (left - taken), abs=0.01)


def test_where_the_last_gpu_is_lost_models_wait_for_another(tenant):
    asked = ask(40, 0.01)
    loss = Failure(0.25, 0, restart_seconds=100.0, detection_seconds=0.01)
    runs = [tenant(asked, gpus_of_memory=12.0, broken=[loss]), tenant(asked, gpus_of_memory=12.0)]
    pool = GpuPool(runs)
    serve_pools(pool)
    for run in runs:
        assert_each_token_came_once(run, asked)
        assert run.instances.held_G.tolist() == [False, True, False, False]
        # a container and both models' other weights
        assert run.record.stalls["container"] == pytest.approx(0.02 + 2 * run.instances.restart_seconds)
