"""EPLB: the published example's plan, the calling convention, the kernels against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moeless.errors import UserError
from moeless.placement import eplb_kernels as kernels
from moeless.placement import reference
from moeless.placement.eplb import rebalance_experts

#: The example of DeepSeek's README: 2 layers, 12 experts, 16 replicas, 4 groups, 2 nodes, 8 GPUs.
README_LOAD = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
README_PHY2LOG = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]

weights = hnp.arrays(np.float32, st.integers(1, 40), elements=st.integers(0, 5000).map(float))


def test_hierarchical_plan_equals_the_published_example():
    phy2log, log2phy, logcnt = rebalance_experts(README_LOAD, 16, 4, 2, 8)
    assert phy2log.tolist() == README_PHY2LOG
    assert logcnt.sum(1).tolist() == [16, 16]
    for layer in range(2):
        for expert in range(12):
            slots = log2phy[layer, expert]
            assert (slots >= 0).sum() == logcnt[layer, expert]
            assert (phy2log[layer, slots[slots >= 0]] == expert).all()


def test_hierarchical_keeps_a_group_on_one_node():
    phy2log, _, _ = rebalance_experts(README_LOAD, 16, 4, 2, 8)
    for layer in range(2):
        node_of_group = [{int(p) // 8 for p in np.flatnonzero(phy2log[layer] // 3 == q)} for q in range(4)]
        assert all(len(nodes) == 1 for nodes in node_of_group)


@given(weights, st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_replication_kernel_equals_numpy(weight_E, extra):
    total = len(weight_E) + extra
    expert, rank, count = np.empty(total, np.int64), np.empty(total, np.int64), np.empty(len(weight_E), np.int64)
    kernels.replicate(weight_E, total, expert, rank, count)
    for mine, plain in zip((expert, rank, count), reference.replicate(weight_E, total), strict=True):
        np.testing.assert_array_equal(mine, plain)


@given(weights, st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_packing_kernel_equals_numpy(weight_P, bins, spare):
    capacity = np.full(bins, -(-len(weight_P) // bins) + spare, np.int64)
    got, slot = np.empty(len(weight_P), np.int64), np.empty(len(weight_P), np.int64)
    kernels.pack(weight_P, capacity, got, slot)
    for mine, plain in zip((got, slot), reference.pack(weight_P, capacity), strict=True):
        np.testing.assert_array_equal(mine, plain)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_relabelling_experts_keeps_the_gpu_loads(data):
    load = np.array(data.draw(st.lists(st.integers(1, 10_000), min_size=16, max_size=16, unique=True)), float)
    order = np.array(data.draw(st.permutations(range(16))))

    def gpu_loads(weight: np.ndarray) -> np.ndarray:
        phy2log, _, logcnt = rebalance_experts(weight[None], 24, 1, 1, 8)
        share = weight[phy2log[0]] / logcnt[0, phy2log[0]]
        return np.sort(share.reshape(8, 3).sum(1))

    np.testing.assert_allclose(gpu_loads(load), gpu_loads(load[order]), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((np.ones((1, 4)), 6, 1, 1, 4), "replicas do not divide"),
        ((np.ones((1, 5)), 8, 4, 2, 4), "experts do not divide"),
        ((np.ones((1, 8)), 4, 1, 1, 4), "too few"),
        ((np.full((1, 4), np.nan), 4, 1, 1, 4), "finite"),
        ((-np.ones((1, 4)), 4, 1, 1, 4), "at least 0"),
        ((np.ones(4), 4, 1, 1, 4), "shape"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        rebalance_experts(*arguments)


def test_hierarchical_policy_uses_nodes(plan_with):
    load = np.arange(16) ** 2 + 1.0
    plan = plan_with("eplb-hierarchical", load, 8, 1)
    assert plan.R == 24
    assert (plan.slots_G(8) == 3).all()
