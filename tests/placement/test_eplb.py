"""EPLB: the published example's plan, the calling convention, the kernels against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moeless.errors import UserError
from moeless.placement import eplb
from moeless.placement.eplb import rebalance_experts
from tests.placement import reference

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


def naive_pack(weight: list[np.float32], bins: int) -> tuple[list[int], list[int]]:
    """Heaviest first into the lightest bin that is not full; every bin gets as many."""
    room = len(weight) // bins
    if room == 1:
        return list(range(bins)), [0] * bins
    held: list[list[int]] = [[] for _ in range(bins)]
    total = [np.float32(0)] * bins
    where, rank = [0] * len(weight), [0] * len(weight)
    for item in sorted(range(len(weight)), key=lambda i: (-weight[i], i)):
        best = min((b for b in range(bins) if len(held[b]) < room), key=lambda b: (total[b], b))
        where[item], rank[item] = best, len(held[best])
        held[best].append(item)
        total[best] += weight[item]
    return where, rank


def naive_eplb(
    load: list[int], replicas: int, groups: int, nodes: int, gpus: int
) -> tuple[list[int], list[list[int]], list[int]]:
    """The published algorithm for one layer, said with lists: slots' experts, experts' slots, copies."""
    if groups % nodes:
        groups = nodes = 1
    weight, size = [np.float32(x) for x in load], len(load) // groups
    node_of, rank = naive_pack([np.float32(sum(load[q * size : (q + 1) * size])) for q in range(groups)], nodes)
    phy2log: list[int] = []
    slots: list[list[int]] = [[] for _ in load]
    for node in range(nodes):
        mine = sorted((q for q in range(groups) if node_of[q] == node), key=lambda q: rank[q])
        experts = [q * size + i for q in mine for i in range(size)]
        copies, order = dict.fromkeys(experts, 1), list(experts)
        while len(order) < replicas // nodes:
            # the first of the node's experts with the most load a copy
            hot = max(experts, key=lambda e: (weight[e] / np.float32(copies[e]), -experts.index(e)))
            copies[hot] += 1
            order.append(hot)
        where, place = naive_pack([weight[e] / np.float32(copies[e]) for e in order], gpus // nodes)
        each = replicas // gpus
        row = [-1] * (replicas // nodes)
        for copy, expert in enumerate(order):
            row[where[copy] * each + place[copy]] = expert
            slots[expert].append(node * len(row) + where[copy] * each + place[copy])
        phy2log += row
    return phy2log, slots, [len(s) for s in slots]


@given(
    st.sampled_from([(1, 1, 4), (4, 2, 8), (4, 4, 8), (6, 3, 6), (2, 1, 3), (3, 2, 6), (12, 2, 4)]),
    st.integers(0, 3),
    st.lists(st.integers(0, 12), min_size=12, max_size=12) | st.lists(st.integers(0, 9999), min_size=12, max_size=12),
)
@settings(max_examples=120, deadline=None)
def test_plans_equal_the_published_algorithm_ties_to_the_lowest_index(shape, more, load):
    groups, nodes, gpus = shape
    replicas = (-(-12 // gpus) + more) * gpus
    phy2log, log2phy, logcnt = rebalance_experts(np.array([load, load[::-1]]), replicas, groups, nodes, gpus)
    for layer, weight in enumerate((load, load[::-1])):
        slots_P, slots_EX, count_E = naive_eplb(weight, replicas, groups, nodes, gpus)
        assert phy2log[layer].tolist() == slots_P
        assert logcnt[layer].tolist() == count_E
        assert [[s for s in row if s >= 0] for row in log2phy[layer].tolist()] == slots_EX


@given(st.integers(0, 2**31), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_the_planners_hold_what_the_calling_convention_says(plan_with, seed, extra):
    load = np.random.default_rng(seed).integers(0, 5000, 16)
    # 16 GPUs are two nodes of 8, so that the hierarchical policy takes 2 groups
    for name, groups, nodes, gpus in (("eplb", 1, 1, 8), ("eplb-hierarchical", 2, 2, 16)):
        plan = plan_with(name, load, gpus, extra)
        phy2log, _, logcnt = rebalance_experts(load[None], plan.R, groups, nodes, gpus)
        assert plan.replicas_E(16).tolist() == logcnt[0].tolist()
        for gpu, held in enumerate(phy2log.reshape(gpus, -1)):
            assert sorted(plan.expert_R[plan.gpu_R == gpu].tolist()) == sorted(held.tolist())


@given(weights, st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_replication_kernel_equals_numpy(weight_E, extra):
    total = len(weight_E) + extra
    mine = eplb.replicate(weight_E, total)
    expert, rank, count = reference.replicate(weight_E, total)
    np.testing.assert_array_equal(mine.expert_P, expert)
    np.testing.assert_array_equal(mine.rank_P, rank)
    np.testing.assert_array_equal(mine.count_E, count)
    np.testing.assert_array_equal(mine.weight_P, weight_E[expert] / count[expert].astype(np.float32))


@given(weights, st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_packing_kernel_equals_numpy(weight_P, bins, spare):
    capacity = np.full(bins, -(-len(weight_P) // bins) + spare, np.int64)
    for mine, plain in zip(eplb.pack(weight_P, capacity), reference.pack(weight_P, capacity), strict=True):
        np.testing.assert_array_equal(mine, plain)


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
