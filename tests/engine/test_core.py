"""The elastic layer equals a dense one for any placement, any quotas, any ranks."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import Budget, LayerPlan
from moeless.costs import COSTS
from moeless.engine.core import PartTimes, order_by_replica, run_layer
from moeless.engine.elastic import even_choice
from moeless.engine.exchange import Exchange
from moeless.engine.ffn import GatedFFN, silu_gate
from moeless.engine.groups import Ranks
from moeless.placement.dispatch import EVEN
from moeless.placement.setting import Setting
from moeless.spec import preset

H, WIDTH, K = 8, 12, 2


class ThreadedExchange(Exchange):
    """The collectives among threads of one process, for tests of many placements."""

    def __init__(self, rank: int, world: int, board: dict[Any, Any], barrier: threading.Barrier) -> None:
        super().__init__(Ranks(rank, world, torch.device("cpu"), None, None, rank, world))
        self.board, self.barrier_ = board, barrier

    def all_to_all(self, rows_NH: torch.Tensor, send_G: Any, receive_S: Any) -> torch.Tensor:
        rank, world = self.ranks.rank, self.ranks.world
        assert len(rows_NH) == sum(send_G)
        for target, block in enumerate(torch.split(rows_NH, list(send_G))):
            self.board[rank, target] = block
        self.barrier_.wait(20)
        blocks = [self.board[source, rank] for source in range(world)]
        self.barrier_.wait(20)
        assert [len(block) for block in blocks] == list(receive_S)
        return torch.cat(blocks)


def dense(hidden: torch.Tensor, topk: torch.Tensor, weights: torch.Tensor, up: Any, down: Any) -> torch.Tensor:
    """Every token through its experts, one by one."""
    out = torch.zeros_like(hidden)
    for t in range(len(hidden)):
        for k in range(topk.shape[1]):
            e = int(topk[t, k])
            out[t] += weights[t, k] * (silu_gate(hidden[t] @ up[e].T) @ down[e].T)
    return out


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A model, ranks (some without tokens or copies), and a plan with replicas."""
    experts, world = draw(st.integers(2, 7)), draw(st.integers(1, 4))
    gpus = draw(st.integers(1, world))
    expert_R, gpu_R, primary_R = [], [], []
    for expert in range(experts):
        places = draw(st.lists(st.integers(0, gpus - 1), min_size=1, max_size=3))
        for index, place in enumerate(places):
            expert_R.append(expert)
            gpu_R.append(place)
            primary_R.append(index == 0)
    plan = LayerPlan.build(0, expert_R, gpu_R, primary_R, num_experts=experts, num_gpus=world)
    tokens = draw(st.lists(st.integers(0, 6), min_size=world, max_size=world))
    return {"experts": experts, "world": world, "plan": plan, "tokens": tokens, "seed": draw(st.integers(0, 99))}


@settings(max_examples=40, deadline=None)
@given(cases())
def test_any_placement_computes_what_a_dense_layer_computes(case: dict[str, Any]) -> None:
    random = torch.Generator().manual_seed(case["seed"])
    experts, world, plan = case["experts"], case["world"], case["plan"]
    up = torch.randn(experts, 2 * WIDTH, H, generator=random)
    down = torch.randn(experts, H, WIDTH, generator=random)
    hidden = [torch.randn(n, H, generator=random) for n in case["tokens"]]
    topk = [torch.randint(0, experts, (n, K), generator=random) for n in case["tokens"]]
    weights = [torch.rand(n, K, generator=random) for n in case["tokens"]]
    load_SE = np.stack([np.bincount(ids.reshape(-1).numpy(), minlength=experts) for ids in topk])
    spec = preset("bundled")
    where = cluster("cpu8")
    setting = Setting(spec, where, COSTS.get("roofline")(spec, where), Budget.even(experts, 8, 1, 1.0), None)
    quota_SR = EVEN(load_SE, plan, np.ones(plan.R, np.bool_), setting)
    board: dict[Any, Any] = {}
    barrier = threading.Barrier(world)
    found: list[Any] = [None] * world

    def work(rank: int) -> None:
        mine = sorted(set(plan.expert_R[plan.gpu_R == rank].tolist()))
        slot_of = {expert: len(mine) - 1 - index for index, expert in enumerate(mine)}
        slots = {"up": torch.zeros(max(1, len(mine)), 2 * WIDTH, H), "down": torch.zeros(max(1, len(mine)), H, WIDTH)}
        for expert, slot in slot_of.items():
            slots["up"][slot], slots["down"][slot] = up[expert], down[expert]
        ffn = GatedFFN({"up": (2 * WIDTH, H), "down": (H, WIDTH)}, torch.float32, silu_gate)
        found[rank] = run_layer(
            hidden[rank],
            topk[rank],
            weights[rank],
            plan=plan,
            quota_SR=quota_SR,
            slot_of_expert=slot_of,
            slots=slots,
            ffn=ffn,
            exchange=ThreadedExchange(rank, world, board, barrier) if world > 1 else _alone(),
            times=PartTimes(),
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for rank in range(world):
        assert found[rank] is not None
        torch.testing.assert_close(
            found[rank], dense(hidden[rank], topk[rank], weights[rank], up, down), rtol=1e-4, atol=1e-4
        )


def _alone() -> Exchange:
    return Exchange(Ranks(0, 1, torch.device("cpu"), None, None, 0, 1))


def test_tokens_fill_quotas_in_token_order_lowest_replica_first() -> None:
    topk = torch.tensor([[1, 0], [1, 2], [1, 0]])
    # replicas: expert 0 on GPU 0, expert 1 on GPUs 0 and 1, expert 2 on GPU 1
    order = order_by_replica(topk, np.array([2, 1, 2, 1]), np.array([0, 1, 1, 2]))
    assert order.tolist() == [1, 5, 0, 2, 4, 3]


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_product_equals_the_loop_with_biases_and_empty_slots(transposed: bool) -> None:
    random = torch.Generator().manual_seed(0)
    up, down = (H, 2 * WIDTH), (WIDTH, H)
    shapes = {"up": up if transposed else up[::-1], "down": down if transposed else down[::-1]}
    shapes |= {"up_bias": (2 * WIDTH,), "down_bias": (H,)}
    slots = {name: torch.randn(4, *shape, generator=random) for name, shape in shapes.items()}
    rows, counts = torch.randn(7, H, generator=random), [3, 0, 4, 0]
    results = []
    for grouped in (True, False):
        ffn = GatedFFN(shapes, torch.float32, silu_gate, transposed=transposed, grouped=grouped)
        results.append(ffn(rows, counts, slots))
        assert ffn.grouped == grouped, "the library refused a product that it supports"
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_oracle_override_is_even_over_all_ranks() -> None:
    turns = np.array([0, 2, 1, 3])
    parts = [even_choice(torch.zeros(n, 2, dtype=torch.int64), turns, first) for n, first in ((3, 0), (0, 3), (5, 3))]
    counts = torch.bincount(torch.cat(parts).reshape(-1), minlength=4)
    assert counts.tolist() == [4, 4, 4, 4]
    # the two experts of a token lie on different GPUs of a contiguous placement
    assert all(set(row) in ({0, 2}, {1, 3}) for part in parts for row in part.tolist())
