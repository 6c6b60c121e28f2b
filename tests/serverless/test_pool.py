import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import InstanceState, LayerPlan
from moeless.costs import COSTS
from moeless.errors import RunFailed, UserError
from moeless.serverless import InstancePool, KeepAlive, PoolSettings
from moeless.spec import Attention, MoESpec

SPEC = MoESpec(
    name="small",
    hidden_size=2048,
    num_layers=2,
    moe_layers=(0, 1),
    num_experts=4,
    top_k=1,
    expert_intermediate_size=4096,
    attention=Attention(heads=2, kv_heads=1, head_dim=32),
    vocab_size=100,
)
WHERE = cluster("h100x8").with_gpus(2)
M = float(SPEC.expert_bytes)


def plan(layer, *extras):
    """Static primaries, two on each GPU, and extras as (expert, gpu)."""
    expert = [0, 1, 2, 3, *(e for e, _ in extras)]
    gpu = [0, 0, 1, 1, *(g for _, g in extras)]
    primary = [True] * 4 + [False] * len(extras)
    return LayerPlan.build(layer, expert, gpu, primary, num_experts=4, num_gpus=2)


def pool_with(**values):
    pool = InstancePool(SPEC, WHERE, COSTS.get("roofline")(SPEC, WHERE), PoolSettings(**values))
    pool.deploy([plan(0), plan(1)], 0.0)
    return pool


def give(pool, made, now):
    pool.provision(made.layer, made.expert_R, made.gpu_R, now)


def test_deployed_copies_are_warm_and_billed_while_they_are_there():
    pool = pool_with()
    assert pool.usable(plan(0), 0.0).all()
    assert pool.resident_byte_seconds(10.0) == pytest.approx(8 * M * 10.0)
    assert pool.moved_bytes == 0


def test_a_new_copy_loads_from_the_peer_and_is_usable_only_then():
    pool = pool_with()
    wanted = plan(0, (0, 1))
    give(pool, wanted, 1.0)
    seconds = WHERE.fast.latency + M / WHERE.fast.bandwidth
    new = (wanted.expert_R == 0) & (wanted.gpu_R == 1)
    assert pool.ready_at(wanted)[new] == pytest.approx(1.0 + seconds)
    assert not pool.usable(wanted, 1.0)[new]
    assert pool.states(wanted, 1.0)[new] == InstanceState.LOADING
    assert pool.usable(wanted, 1.0 + 2 * seconds).all()
    assert pool.loads_by_tier() == {"peer": 1, "peer-slow": 0, "host": 0}


def test_a_gpus_copy_engine_takes_one_transfer_at_a_time():
    pool = pool_with()
    wanted = plan(0, (0, 1), (1, 1))
    give(pool, wanted, 0.0)
    seconds = WHERE.fast.latency + M / WHERE.fast.bandwidth
    ready = np.sort(pool.ready_at(wanted))[-2:]
    assert ready == pytest.approx([seconds, 2 * seconds])


def test_an_unplanned_copy_stays_for_its_keep_alive_and_is_reused_warm():
    pool = pool_with(keep_alive=KeepAlive("fixed", 5.0))
    give(pool, plan(0, (0, 1)), 0.0)
    give(pool, plan(0), 1.0)
    assert pool.alive(plan(0)).R == 5
    give(pool, plan(0, (0, 1)), 4.0)
    assert pool.moved_bytes == M
    give(pool, plan(0), 4.0)
    # 4 + 5 s of keep-alive are over
    give(pool, plan(0), 20.0)
    assert pool.evictions == 1
    assert pool.alive(plan(0)).R == 4
    # billed from the start of its load to the end of its keep-alive, not to when somebody looked
    assert pool.resident_byte_seconds(20.0) == pytest.approx(8 * M * 20.0 + M * 9.0)


def test_lru_keeps_copies_until_memory_is_needed_and_evicts_the_oldest():
    pool = pool_with(keep_alive=KeepAlive("lru"), expert_bytes_G=(10 * M, 6 * M))
    give(pool, plan(0, (0, 1)), 0.0)
    give(pool, plan(0, (1, 1)), 100.0)
    assert pool.evictions == 0
    # GPU 1 is full: the copy of expert 0, unplanned since 100 s, makes room
    give(pool, plan(1, (0, 1)), 200.0)
    assert pool.evictions == 1
    assert np.isinf(pool.born_LEG[0, 0, 1])
    # nothing unplanned is left there
    give(pool, plan(1, (0, 1), (1, 1)), 300.0)
    assert pool.refused == 1
    pool.check()


def test_adaptive_keep_alive_learns_the_gaps():
    pool = pool_with(keep_alive=KeepAlive("adaptive", 1000.0))
    now = 0.0
    for _ in range(8):
        give(pool, plan(0, (0, 1)), now)
        give(pool, plan(0), now + 0.01)
        now += 0.5
    # gaps of about half a second: the copy is given up between one and two gaps later, not after 1000 s
    give(pool, plan(0), now + 1.1)
    assert pool.evictions == 1


def test_instant_copies_are_ready_at_once():
    pool = pool_with(instant=True)
    wanted = plan(0, (0, 1))
    give(pool, wanted, 3.0)
    assert pool.usable(wanted, 3.0).all()


def test_kv_cache_pushes_unplanned_copies_out_and_its_overflow_is_noted():
    pool = pool_with(keep_alive=KeepAlive("lru"))
    give(pool, plan(0, (0, 1)), 0.0)
    give(pool, plan(0), 1.0)
    room = WHERE.device.memory_bytes - SPEC.non_expert_bytes
    pool.share_memory(np.array([0.0, room - 4 * M]), 2.0)
    assert pool.evictions == 1
    assert pool.kv_overflow_bytes == 0
    pool.share_memory(np.array([0.0, room - 3 * M]), 3.0)
    assert pool.kv_overflow_bytes == pytest.approx(M)


def test_scale_to_zero_frees_everything_after_the_keep_alive_and_bills_until_then():
    pool = pool_with(keep_alive=KeepAlive("fixed", 5.0), scale_to_zero=True, container_seconds=2.0)
    assert not pool.sleep(10.0, 14.0)
    assert pool.sleep(20.0, 60.0)
    assert pool.resident_byte_seconds(60.0) == pytest.approx(8 * M * 25.0)
    assert pool.gpu_seconds(60.0) == pytest.approx(2 * 60.0 - 2 * 35.0)
    assert pool.wake_seconds == pytest.approx(2.0 + SPEC.non_expert_bytes / WHERE.device.host_bandwidth)
    give(pool, plan(0), 60.0 + pool.wake_seconds)
    # nobody else has the weights: all four come from the host
    assert pool.loads_by_tier()["host"] == 4
    pool.check()


def test_experts_that_do_not_fit_are_refused_with_a_sentence():
    pool = InstancePool(SPEC, WHERE, COSTS.get("roofline")(SPEC, WHERE), PoolSettings(expert_bytes_G=(3 * M, 4 * M)))
    with pytest.raises(RunFailed, match="use more GPUs"):
        pool.deploy([plan(0), plan(1)], 0.0)


@pytest.mark.parametrize("text", ["", "soon", "fixed", "lru:5", "adaptive:x", "-1"])
def test_bad_keep_alive_is_one_sentence(text):
    with pytest.raises(UserError, match="keep-alive"):
        KeepAlive.parse(text)


EXTRAS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), max_size=5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), max_size=5)), max_size=25
    )
)
def test_memory_is_conserved_whatever_the_plans(steps):
    pool = pool_with(keep_alive=KeepAlive("fixed", 3.0), expert_bytes_G=(6 * M, 5 * M))
    resident, now = 0.0, 0.0
    for layer, extras in steps:
        now += 1.0
        give(pool, plan(layer, *extras), now)
        pool.check()
        assert (pool.resident_G <= pool.capacity_G).all()
        # primaries are planned, so they are always there
        assert np.isfinite(pool.born_LEG[:, [0, 1], 0]).all()
        later = pool.resident_byte_seconds(now)
        assert later >= resident
        resident = later


def test_instances_start_beside_each_other_and_only_transfers_queue():
    fast, slow = pool_with(), pool_with(start_seconds=0.5)
    wanted = plan(0, (0, 1), (1, 1))
    for pool in (fast, slow):
        give(pool, wanted, 1.0)
    late_R = slow.ready_at(wanted) - fast.ready_at(wanted)
    assert late_R == pytest.approx(np.where(wanted.primary_R, 0.0, 0.5))
    assert (slow.engine_free_G == fast.engine_free_G).all()
