"""Every compiled way of dealing: tokens kept by source and expert, none to copies that do not serve, rows that fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.contracts import LayerPlan
from moeless.placement import PLANNERS, dealing
from tests.placement.conftest import make_setting

#: Planners whose rule is compiled.
COMPILED = [name for name in PLANNERS.names() if PLANNERS.get(name).dispatch.deal is not None]
seeds, widths, gpu_counts = st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 6)
#: Tokens that a source rank has for an expert: few, so that there are runs of none; and many.
most_tokens = st.sampled_from([1, 4, 3000])


def random_layer(
    seed: int, experts: int, gpus: int, most: int
) -> tuple[np.random.Generator, np.ndarray, LayerPlan, np.ndarray]:
    """Loads, a plan with extras anywhere, and which of its copies are there."""
    rng = np.random.default_rng(seed)
    extra = int(rng.integers(0, 2 * experts + 1))
    expert = np.concatenate([np.arange(experts), rng.integers(0, experts, extra)])
    gpu, primary = rng.integers(0, gpus, len(expert)), np.arange(len(expert)) < experts
    plan = LayerPlan.build(0, expert, gpu, primary, num_experts=experts, num_gpus=gpus)
    load = rng.integers(0, most + 1, (gpus, experts)) * (rng.random((gpus, experts)) < 0.8)
    return rng, load, plan, rng.random(plan.R) < rng.random()


def check_rows(deal: Callable[..., int], load: np.ndarray, plan: LayerPlan, usable: np.ndarray) -> np.ndarray:
    """Deal and hold the rows to what every way of dealing promises; returns them as quotas, ``[S, R]``."""
    sources, experts = load.shape
    rows = dealing.table_rows(load, plan.expert_R, plan.gpu_R, plan.primary_R, usable, sources)
    at_most = dealing.rows_at_most(rows.load, rows.copies)
    assert len(rows.dealt.source_X) == at_most
    # room beyond what is promised shows rows that would have been written past the end
    room = dealing.Dealt(*(np.full(2 * at_most + 64, -1, np.int64) for _ in range(3)))
    count = deal(rows.load, rows.copies, room)
    assert count <= at_most
    source_X, copy_X, tokens_X = (column[:count] for column in room)
    assert (tokens_X >= 1).all()
    serving = dealing.serving_R(plan, usable, experts)
    assert serving[copy_X].all()
    kept = np.zeros_like(load)
    np.add.at(kept, (source_X, plan.expert_R[copy_X]), tokens_X)
    np.testing.assert_array_equal(kept, load)
    quota = np.full((sources, plan.R), -1, np.int64)
    dealing.fill_quotas(room, count, quota)
    summed = np.zeros_like(quota)
    np.add.at(summed, (source_X, copy_X), tokens_X)
    np.testing.assert_array_equal(quota, summed)
    return quota


@pytest.mark.parametrize("name", COMPILED)
@given(seed=seeds, experts=widths, gpus=gpu_counts, most=most_tokens, costs=st.sampled_from(["roofline", "paper"]))
@settings(max_examples=40, deadline=None)
def test_compiled_rules_keep_tokens_and_give_them_to_serving_copies(name, seed, experts, gpus, most, costs):
    _, load, plan, usable = random_layer(seed, experts, gpus, most)
    rule, setting = PLANNERS.get(name).dispatch, make_setting(name, experts, gpus, costs=costs)
    numbers, layer_costs = setting.derived(rule.numbers), setting.costs.layer_costs

    def deal(load: Any, copies: Any, room: Any) -> int:
        return rule.deal(load, copies, numbers, layer_costs, room)

    quota = check_rows(deal, load, plan, usable)
    np.testing.assert_array_equal(quota, rule(load, plan, usable, setting))


@given(seeds, widths, gpu_counts, most_tokens)
@settings(max_examples=60, deadline=None)
def test_shares_fixed_ahead_are_kept_within_a_token(seed, experts, gpus, most):
    rng, load, plan, usable = random_layer(seed, experts, gpus, most)
    share = rng.random(plan.R) * (rng.random(plan.R) < 0.7)
    quota = check_rows(lambda rows, copies, room: dealing.deal_by_shares(rows, copies, share, room), load, plan, usable)
    serving = dealing.serving_R(plan, usable, experts)
    whole_E = np.bincount(plan.expert_R, share * serving, experts)
    shared_R = serving & (whole_E[plan.expert_R] > 1e-6)
    ideal = load[:, plan.expert_R] * (share / np.maximum(whole_E, 1e-6)[plan.expert_R])
    assert (np.abs(quota - ideal)[:, shared_R] < 1 + 1e-6).all()


@given(seeds, widths, gpu_counts, most_tokens)
@settings(max_examples=60, deadline=None)
def test_homes_take_all_and_totals_are_met(seed, experts, gpus, most):
    rng, load, plan, usable = random_layer(seed, experts, gpus, most)
    serving = dealing.serving_R(plan, usable, experts)
    home = check_rows(dealing.deal_to_homes, load, plan, usable)
    for e in range(experts):
        copies = np.flatnonzero(serving & (plan.expert_R == e))
        primary = copies[plan.primary_R[copies]]
        np.testing.assert_array_equal(home[:, primary[0] if len(primary) else copies[0]], load[:, e])
    total = np.zeros(plan.R, np.int64)
    for e in range(experts):
        copies = np.flatnonzero(serving & (plan.expert_R == e))
        total[copies] = rng.multinomial(load[:, e].sum(), rng.dirichlet(np.full(len(copies), 0.5)))
    quota = check_rows(lambda rows, copies, room: dealing.deal_totals(rows, copies, total, room), load, plan, usable)
    np.testing.assert_array_equal(quota.sum(0), total)


@given(seeds, st.integers(2, 12), gpu_counts, st.integers(0, 60), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_layers_load_is_the_same_from_tokens_and_from_a_table(seed, experts, gpus, tokens, by_table):
    rng = np.random.default_rng(seed)
    topk_TLK = np.stack([rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :2] for _ in range(3)], 1)
    row_T, rank_T = rng.permutation(tokens), np.sort(rng.integers(0, gpus, tokens))
    load_SE = np.zeros((gpus, experts), np.int64)
    np.add.at(load_SE, (np.repeat(rank_T, 2), topk_TLK[row_T, 1].reshape(-1)), 1)
    runs = max(gpus * experts, 2 * tokens)
    found, wanted = dealing.room_for_load(experts, runs), dealing.room_for_load(experts, runs)
    memory = np.empty((gpus if by_table else 0, experts), np.int64)
    dealing.take_tokens(topk_TLK.astype(np.uint8), row_T, rank_T, 1, memory, found)
    dealing.take_table(load_SE, wanted)
    np.testing.assert_array_equal(found.tokens_E, load_SE.sum(0))
    for e in range(experts):
        for load in (found, wanted):
            at = slice(load.first_E[e], load.last_E[e])
            assert load.source_N[at].tolist() == np.flatnonzero(load_SE[:, e]).tolist()
            assert load.tokens_N[at].tolist() == load_SE[load_SE[:, e] > 0, e].tolist()
