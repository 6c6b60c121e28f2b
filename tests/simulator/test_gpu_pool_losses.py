"""Several models on one set of GPUs while these break: every request of every model gets every token once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import Request
from moeless.errors import RunFailed, UserError
from moeless.serverless import KeepAlive, PoolSettings
from moeless.simulator import SimulationSettings
from moeless.simulator.failures import Failure
from moeless.simulator.gpu_pool import GpuPool
from moeless.simulator.serving_loop import serve_pools
from moeless.simulator.tenants import Tenant
from moeless.workloads.schedulers import Continuous
from tests.simulator.conftest import losses, runtime_of

GPUS = 4


def weights_per_gpu(spec):
    return spec.L * spec.E / GPUS * spec.expert_bytes + spec.non_expert_bytes


@pytest.fixture(scope="session")
def tenant(spec, topk, replay_of):
    def make(asked, policy="static", share=8.0, broken=(), warmup=0, keep=0.002, width=1, **pool):
        """``share``: a GPU's memory, in times of what ``spec`` takes of it; ``width``: how wide experts are."""
        where = cluster("h100x8").with_gpus(GPUS)
        device = dataclasses.replace(where.device, memory_bytes=share * weights_per_gpu(spec))
        where = dataclasses.replace(where, device=device)
        wide = dataclasses.replace(spec, expert_intermediate_size=width * spec.expert_intermediate_size)
        runtime = runtime_of(policy, wide, where)
        how = SimulationSettings(
            PoolSettings(keep_alive=KeepAlive("fixed", keep), **pool),
            replan_seconds=0.01,
            failures=tuple(broken),
            warmup_iterations=warmup,
        )
        scheduler = Continuous(asked, GPUS, token_budget=16, max_running=7)
        return Tenant(replay_of(GPUS, topk, asked), asked, scheduler, runtime, how, None, None, None)

    return make


def ask(count, gap, start=0.0):
    return [Request(i, start + gap * i, 8, 1 + i % 9, trace_request=i % 40) for i in range(count)]


def assert_each_token_came_once(run, asked):
    times = run.clocks.times()
    assert run.clocks.unfinished == 0
    assert times.output_tokens_N.tolist() == [request.output_tokens for request in asked]
    assert times.itl_count_I.sum() == sum(request.output_tokens - 1 for request in asked)
    assert (times.ttft_N > 0).all()
    assert (times.itl_seconds_I >= 0).all()


@settings(max_examples=25, deadline=None)
@given(
    broken=st.lists(losses(2, GPUS, most=3, seconds=0.08), min_size=1, max_size=3),
    policies=st.tuples(*[st.sampled_from(["static", "eplb:history", "moeless:last:1", "elastic:last:1"])] * 3),
    share=st.sampled_from([1.3, 5.0, 8.0, 12.0]),
    patience=st.sampled_from([0.0, 0.01, 5.0]),
    gap=st.sampled_from([0.0, 0.001, 0.004]),
    zero=st.booleans(),
)
def test_no_request_of_any_model_is_lost_or_counted_twice(tenant, broken, policies, share, patience, gap, zero):
    how = {"scale_to_zero": zero, "container_seconds": 0.003}
    asked = [ask(12, gap, start) for start in (0.0, 0.01, 0.05)]
    if share < 2:
        # one model alone fits, on three GPUs or four; planners that put copies freely would find no room
        policies = ["static"] * 3
    broken = [*broken, (), ()][:3]
    runs = [tenant(a, policy, share, b, **how) for a, policy, b in zip(asked, policies, broken, strict=True)]
    pool = GpuPool(runs, patience)
    serve_pools(pool)
    for run, requests in zip(runs, asked, strict=True):
        assert_each_token_came_once(run, requests)
        assert pool.now >= run.clocks.times().last_token_N.max()
    busy = sum(run.busy for run in runs)
    assert GPUS * busy * (1 - 1e-9) <= pool.gpu_seconds <= GPUS * pool.now * (1 + 1e-9)
    assert zero or pool.gpu_seconds == GPUS * pool.now


def test_gpus_that_no_model_has_work_for_are_given_back(tenant):
    first, later = [*ask(4, 0.0), *[dataclasses.replace(r, id=4, arrival=50.0) for r in ask(1, 0.0)]], ask(4, 0.0, 20.0)
    how = {"scale_to_zero": True, "container_seconds": 1.0, "keep": 5.0}
    # lost while nobody holds it, and one that others are taken for
    broken = [Failure(35.0, 1, restart_seconds=1000.0), Failure(2.0, 2, restart_seconds=1000.0)]
    runs = [tenant(first, broken=broken, **how), tenant(later, **how)]
    pool = GpuPool(runs)
    serve_pools(pool)
    for run, requests in zip(runs, (first, later), strict=True):
        assert_each_token_came_once(run, requests)
        assert not run.instances.down_G.any()
    # three times work: at 0, 20 and 50 s; 5 s after it the GPUs go, with it a container starts
    assert pool.gpu_seconds == pytest.approx(GPUS * (5.0 + 6.0 + 1.0), rel=0.05)
    assert pool.now == pytest.approx(51.0, abs=0.1)
    assert [run.record.stalls["container"] for run in runs] == [1.0, 1.0]
    assert [each.wakes for each in pool.tenants] == [1, 1]
    assert pool.resident_byte_seconds < 0.5 * pool.now * sum(run.instances.resident_G.max() * GPUS for run in runs)
    with pytest.raises(UserError, match="agree"):
        GpuPool([tenant(first, **how), tenant(later)])


def test_a_lost_gpu_is_lost_to_every_model_and_named_twice_it_is_one_loss(tenant):
    asked = ask(12, 0.0)
    loss = Failure(0.001, 3, restart_seconds=100.0, detection_seconds=0.25)
    runs = [tenant(asked, broken=[loss]) for _ in range(2)]
    pool = GpuPool(runs)
    serve_pools(pool)
    for run in runs:
        assert run.instances.down_G.tolist() == [False, False, False, True]
        assert not np.isfinite(run.instances.born_LEG[:, :, 3]).any()
        # noticed once, and both had requests that waited meanwhile
        assert 0.2499 < run.record.stalls["failure"] < 0.5
        assert run.record.stalls["recovery"] > 0
        assert any("lost their KV cache" in text for text in run.remarks())
    alone = GpuPool([tenant(asked) for _ in range(2)])
    serve_pools(alone)
    assert pool.now > alone.now + 0.25


def test_a_gpu_lost_while_a_model_sleeps_is_missing_when_it_wakes(tenant, spec):
    first, later = ask(6, 0.001), ask(6, 0.001, 5.0)
    runs = [tenant(first, share=1.9), tenant(later, share=1.9, broken=[Failure(1.0, 2, restart_seconds=1000.0)])]
    pool = GpuPool(runs)
    assert [each.awake for each in pool.tenants] == [True, False]
    serve_pools(pool)
    assert [each.wakes for each in pool.tenants] == [0, 1]
    awake = np.isfinite(runs[1].instances.born_LEG).sum((0, 1))
    assert awake[2] == 0
    assert awake.sum() == spec.L * spec.E
    # nobody waited while it was lost, nothing had to be computed again
    assert runs[1].record.stalls["recovery"] == 0
    assert [run.record.stalls["failure"] for run in runs] == [0.0, 0.0]
    assert_each_token_came_once(runs[1], later)


def test_a_copys_failure_is_its_models_alone_and_may_hit_it_on_its_way(tenant):
    asked = ask(6, 0.004)
    # the second falls into the reload after the first
    broken = [Failure(0.004, 0, layer=1, expert=0), Failure(0.5, 0, layer=1, expert=0, detection_seconds=0.0)]
    runs = [tenant(asked, broken=broken), tenant(asked)]
    pool = GpuPool(runs)
    serve_pools(pool)
    assert runs[0].instances.evictions >= 1
    assert runs[1].instances.evictions == 0
    for run in runs:
        assert_each_token_came_once(run, asked)


def test_where_too_few_gpus_are_left_models_wait_for_the_lost_one(tenant):
    loss = [Failure(0.06, gpu, restart_seconds=2.0, detection_seconds=0.0) for gpu in (1, 2, 3)]
    late = ask(4, 0.05, 0.5)
    runs = [tenant(ask(1, 0.0), share=1.5), tenant(late, share=1.5, broken=loss[:2])]
    pool = GpuPool(runs)
    serve_pools(pool)
    assert runs[1].clocks.times().first_token_N.min() > 2.0
    assert_each_token_came_once(runs[1], late)


@pytest.mark.parametrize("policy", ["static", "elastic:last:1", "moeless:last:1"])
@pytest.mark.parametrize("running", [False, True])
def test_a_model_that_a_loss_leaves_no_room_for_waits_for_the_gpu(running, policy, tenant):
    # either idle, with work again during the outage, or in the midst of requests when the GPUs go
    idle = [Request(0, 0.0, 8, 2, trace_request=0), Request(1, 0.5, 8, 2, trace_request=1)]
    busy = [Request(i, 0.1, 8, 13, trace_request=i) for i in range(6)]
    asked = busy if running else idle
    loss = [Failure(0.1005, gpu, restart_seconds=2.0, detection_seconds=0.0) for gpu in (1, 2)]
    run = tenant(asked, policy, share=1.5, broken=loss)
    pool = GpuPool([run])
    serve_pools(pool)
    assert_each_token_came_once(run, asked)
    assert pool.tenants[0].wakes == 1
    times = run.clocks.times()
    if running:
        assert (times.first_token_N < 0.1005).all()
        assert (times.last_token_N > 2.1005).all()
        # the KV caches on the GPUs that stayed went too
        assert run._recovered == len(busy)
        assert run.record.stalls["recovery"] > 0
    else:
        assert times.first_token_N[0] < 0.1
        assert times.first_token_N[1] > 2.1005
        assert run.record.stalls["recovery"] == 0


def test_a_gpu_that_comes_back_while_another_loss_is_noticed_turns_no_clock_back(tenant):
    loss = Failure(0.0, 2, restart_seconds=1e-4, detection_seconds=0.0)
    copy = Failure(0.0, 2, layer=0, expert=0, detection_seconds=0.001)
    asked = ask(4, 0.001)
    runs = [tenant(asked, share=1.3, broken=[failure]) for failure in (loss, copy)]
    serve_pools(GpuPool(runs))
    for run in runs:
        assert_each_token_came_once(run, asked)


def test_a_model_without_room_on_gpus_that_never_come_back_ends_the_run(tenant):
    loss = [Failure(0.002, gpu, restart_seconds=np.inf) for gpu in (1, 2, 3)]
    with pytest.raises(RunFailed, match="small has work, and the GPUs that are left have no room"):
        serve_pools(GpuPool([tenant(ask(4, 0.05), share=1.2, broken=loss)]))


def test_who_finds_no_room_after_a_loss_keeps_nobody_else_from_waking(tenant):
    # on three GPUs there is room for one of the small models, and none for the wide one
    loss = Failure(0.1, 3, restart_seconds=5.0, detection_seconds=0.0)
    small, late = [*ask(2, 0.05), Request(2, 0.3, 8, 2, trace_request=2)], ask(2, 0.0, 0.5)
    runs = [tenant(small, share=2.2, broken=[loss]), tenant(ask(2, 0.0, 0.2), share=2.2, width=2)]
    runs.append(tenant(late, share=2.2))
    pool = GpuPool(runs, 0.01)
    serve_pools(pool)
    assert runs[1].clocks.times().first_token_N.min() > 5.1
    # long after the wide one's patience, and while it still waits
    assert runs[2].clocks.times().first_token_N.max() < 0.6
    for run, asked in zip(runs, (small, ask(2, 0.0, 0.2), late), strict=True):
        assert_each_token_came_once(run, asked)


def test_nothing_is_loaded_for_a_sleeping_model_when_a_gpu_goes_or_comes_back(tenant):
    loss = Failure(1.0, 2, restart_seconds=1.0)
    runs = [tenant(ask(6, 0.5), share=1.5, broken=[loss]), tenant(ask(1, 0.0, 5.0), share=1.5)]
    pool = GpuPool(runs)
    assert not pool.tenants[1].awake
    serve_pools(pool)
    everything = runs[1].spec.L * runs[1].spec.E * runs[1].spec.expert_bytes
    assert runs[1].instances.resident_byte_seconds(pool.now) <= everything * (pool.now - 5.0)
    assert runs[1].instances.moved_bytes == everything


def test_gpus_are_not_given_back_before_the_end_of_a_losss_detection(tenant):
    # idle from the start's end on: the keep-alive would end at 1 s, in the midst of the detection
    loss = Failure(0.9, 2, restart_seconds=100.0, detection_seconds=0.5)
    asked = [*ask(1, 0.0), Request(1, 10.0, 8, 2, trace_request=1)]
    run = tenant(asked, broken=[loss], keep=1.0, scale_to_zero=True, container_seconds=0.5)
    pool = GpuPool([run])
    serve_pools(pool)
    assert pool.gpu_seconds == pytest.approx(GPUS * (0.9 + 0.5 + pool.now - 10.0))


def test_warmup_leaves_each_models_first_iterations_out_of_its_record(tenant):
    asked = ask(10, 0.001)
    runs = [tenant(asked, warmup=warmup) for warmup in (0, 5)]
    serve_pools(GpuPool(runs))
    whole, rest = (run.record for run in runs)
    assert rest.iterations == whole.iterations - 5
    # bills keep them
    assert rest.billed[0] > rest.tally[0]


def test_small_models_do_not_take_what_others_leave_for_a_large_one(tenant):
    # the last model needs the memory of two others, of which there are three, all with work always
    busy = [Request(i, 0.0005 * i, 8, 13, trace_request=i % 40) for i in range(400)]
    one = [Request(0, 0.01, 8, 13, trace_request=0)]
    runs = [tenant(asked, share=2.2) for asked in (busy, busy, busy, one)]
    pool = GpuPool(runs, 0.02)
    # as if its weights were twice as many
    runs[3].need_G = runs[3].need_G * 2.0
    serve_pools(pool)
    assert runs[3].clocks.times().last_token_N[0] < 0.12 < 0.2 < pool.now
