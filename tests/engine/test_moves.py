"""Every rank computes the same moves, and each can be carried out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import LayerPlan
from moeless.costs import COSTS, CostModel
from moeless.engine.moves import Held, Move, moves_to, num_words, pack
from moeless.spec import preset

E, G = 4, 4


def costs(peer_bandwidth: float = 1e12) -> CostModel:
    found = cluster("h100x8").with_gpus(G)
    fast = dataclasses.replace(found.fast, bandwidth=peer_bandwidth)
    return COSTS.get("roofline")(preset("bundled"), dataclasses.replace(found, fast=fast, island_size=2))


def plan(extras: list[tuple[int, int]]) -> LayerPlan:
    """Expert e on GPU e, and extras (expert, GPU)."""
    expert_R, gpu_R = [*range(E), *(e for e, _ in extras)], [*range(E), *(g for _, g in extras)]
    return LayerPlan.build(0, expert_R, gpu_R, [True] * E + [False] * len(extras), num_experts=E, num_gpus=G)


@given(st.integers(1, 200), st.integers(0, 2**32))
def test_readiness_survives_its_words(experts: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    ready_GE, busy_GE = random.random((3, experts)) < 0.5, random.random((3, experts)) < 0.5
    words = np.stack([pack(r, b) for r, b in zip(ready_GE, busy_GE, strict=True)])
    assert words.shape == (3, num_words(experts))
    found = Held.unpack(words, experts)
    assert (found.ready_GE == ready_GE).all()
    assert (found.busy_GE == busy_GE).all()


def test_a_copy_comes_from_the_nearest_rank_that_has_it_and_keeps_it() -> None:
    held = Held.of_plan(plan([(0, 2)]), G, E)
    # GPUs 0, 1 and 2, 3 are islands; expert 0 lies on 0 and 2
    assert moves_to(plan([(0, 2), (0, 3)]), held, costs(), 1e6, "auto") == [Move(0, 0, 2, 3)]
    assert moves_to(plan([(0, 3)]), held, costs(), 1e6, "peer") == [Move(0, 0, 0, 3)]


def test_senders_take_turns() -> None:
    held = Held.of_plan(plan([(0, 1)]), G, E)
    moves = moves_to(plan([(0, 1), (0, 2), (0, 3)]), held, costs(), 1e6, "peer")
    assert [move.source for move in moves] == [0, 1]


def test_auto_takes_host_memory_where_links_are_slower_and_host_takes_no_other() -> None:
    held, wanted = Held.of_plan(plan([]), G, E), plan([(0, 1)])
    assert moves_to(wanted, held, costs(1e6), 1e6, "auto") == [Move(0, 0, None, 1)]
    assert moves_to(wanted, held, costs(1e6), 1e6, "peer") == [Move(0, 0, 0, 1)]
    assert moves_to(wanted, held, costs(), 1e6, "host") == [Move(0, 0, None, 1)]


@pytest.mark.parametrize("state", ["ready", "busy"])
def test_a_copy_that_is_there_or_on_its_way_does_not_move(state: str) -> None:
    held = Held.of_plan(plan([]), G, E)
    (held.ready_GE if state == "ready" else held.busy_GE)[1, 0] = True
    assert moves_to(plan([(0, 1)]), held, costs(), 1e6, "peer") == []


@given(st.integers(0, 2**32))
def test_whoever_sends_has_the_expert_and_stays_planned(seed: int) -> None:
    random = np.random.default_rng(seed)
    ready_GE = random.random((G, E)) < 0.5
    held = Held(ready_GE, ~ready_GE & (random.random((G, E)) < 0.3))
    new = plan([(int(e), int(g)) for e, g in zip(*np.nonzero(random.random((E, G)) < 0.5), strict=True) if e != g])
    stays = set(zip(new.expert_R.tolist(), new.gpu_R.tolist(), strict=True))
    moves = moves_to(new, held, costs(), 1e6, "peer")
    for move in moves:
        assert not held.ready_GE[move.target, move.expert]
        if move.source is not None:
            assert held.ready_GE[move.source, move.expert]
            assert (move.expert, move.source) in stays
    arriving = {(move.expert, move.target) for move in moves}
    here = {(int(e), int(g)) for g, e in zip(*np.nonzero(held.ready_GE | held.busy_GE), strict=True)}
    assert stays <= arriving | here
