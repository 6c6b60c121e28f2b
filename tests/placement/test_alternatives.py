"""METRO, LLEP and CRAFT do what they are named for; the bound and the exact plan bracket every planner."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import Budget, Forecast, LayerPlan, Phase, PlanInput
from moeless.costs import COSTS
from moeless.errors import UserError
from moeless.placement import PLANNERS
from moeless.placement.bound import layer_bound
from moeless.placement.craft import benefits_N, rounds_L
from moeless.placement.exact import terms_seconds
from moeless.placement.llep import LlepParams, spill
from moeless.placement.milp import MilpParams, best_plan
from moeless.placement.setting import Setting
from moeless.spec import Attention, MoESpec

SPEC = MoESpec("eight", 2880, 1, (0,), 8, 1, 2880, Attention(8, 8, 64), 1000)
FOUR = cluster("h100x8").with_gpus(4)
COST = COSTS.get("roofline")(SPEC, FOUR)
ROOM = Budget.even(8, 4, 1, SPEC.expert_bytes)


def run(name: str, plan: LayerPlan, load_SE: np.ndarray) -> np.ndarray:
    planner = PLANNERS.get(name)
    return planner.dispatch(load_SE, plan, np.ones(plan.R, bool), Setting(SPEC, FOUR, COST, ROOM, planner.params()))


@given(seed=st.integers(0, 2**31), tokens=st.sampled_from([3, 500, 40_000]))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("name", ["metro", "llep", "craft", "eplb", "moeless", "elastic"])
def test_nothing_is_faster_than_the_bound(plan_with, name, seed, tokens):
    rng = np.random.default_rng(seed)
    plan = plan_with(name, rng.integers(0, 20_000, 8), 4, 1)
    load = rng.multinomial(tokens, rng.dirichlet(np.full(32, 0.3))).reshape(4, 8)
    seconds = terms_seconds(run(name, plan, load).sum(0), plan.gpu_R, COST.terms(), 4)
    assert seconds >= layer_bound(load.sum(0), COST.terms(), 4, 4) * (1 - 1e-9)


def test_metro_activates_one_copy_per_expert_and_balances_them():
    # GPU 0 holds 0, 1, 2; the copies of 1 and 2 on GPUs 1 and 2 let each GPU activate one expert
    plan = LayerPlan.build(
        0, [0, 1, 2, 3, 4, 5, 6, 7, 1, 2], [0, 0, 0, 3, 3, 3, 3, 3, 1, 2], [True] * 8 + [False] * 2,
        num_experts=8, num_gpus=4,
    )  # fmt: skip
    load = np.zeros((4, 8), int)
    load[:, :3] = 2
    quota = run("metro", plan, load)
    active = np.bincount(plan.gpu_R[quota.sum(0) > 0], minlength=4)
    assert active.tolist() == [1, 1, 1, 0]


def test_llep_leaves_mild_imbalance_alone_and_spills_heavy_ones(plan_with):
    heavy = np.array([40_000, 0, 1000, 0, 1000, 0, 1000, 0])
    plan = plan_with("llep", heavy, 4, 1)
    assert set(plan.expert_R[~plan.primary_R].tolist()) == {0}
    load = np.zeros((4, 8), int)
    load[0] = heavy
    tokens_G = np.bincount(plan.gpu_R, weights=run("llep", plan, load).sum(0), minlength=4)
    assert tokens_G.max() < 1.2 * tokens_G.mean()
    assert plan_with("llep", np.full(8, 100.0), 4, 1).num_extra == 0


def test_llep_spills_chunks_of_a_least_size_to_the_least_loaded():
    home, anywhere = np.array([0, 0, 1, 2, 3, 3, 3, 3]), np.ones((8, 4), bool)
    load = np.array([30, 10, 8, 4, 0, 0, 0, 0.0])
    # mean 13: GPU 0 has 40, so 27 of its largest expert leave: 9 fit on GPU 2, 5 on GPU 1, 13 on GPU 3
    spilled = spill(load, home, anywhere, LlepParams(min_tokens=1))
    assert spilled[0].tolist() == [3, 5, 9, 13]
    # no room for chunks of 10 after the first: the rest goes to the least loaded GPU all the same
    assert spill(load, home, anywhere, LlepParams(min_tokens=10))[0].tolist() == [3, 0, 14, 13]
    assert spill(load, home, anywhere, LlepParams(min_tokens=1, imbalance=3.1))[0, 0] == 30
    # only GPU 1 has a copy: it takes what it has room for, the rest ends sooner at home
    only = np.zeros((8, 4), bool)
    only[0, 1] = True
    assert spill(load, home, only, LlepParams(min_tokens=1))[0].tolist() == [25, 5, 0, 0]


def test_craft_spends_replicas_where_they_balance(plan_with):
    assert plan_with("craft", np.full(8, 100.0), 4, 2).num_extra == 0
    assert plan_with("craft", [5000, 10, 10, 10, 10, 10, 10, 10], 4, 2).num_extra > 0
    curve = benefits_N(np.array([5000.0, 10, 10, 10, 10, 10, 10, 10]), np.full(4, 4), 8)
    assert curve[-1] > curve[0]


def test_craft_spends_a_models_replicas_in_the_layers_that_need_them():
    craft, hot = PLANNERS.get("craft"), [5000.0, 10, 10, 10, 10, 10, 10, 10]

    def plans(*loads, **params):
        inputs = [
            PlanInput(layer, Phase.PREFILL, Forecast(np.array(load), np.zeros(8), 1, "test"))
            for layer, load in enumerate(loads)
        ]
        return craft.plan_all(inputs, Setting(SPEC, FOUR, COST, ROOM, craft.params(**params)))

    # the even layers leave theirs to the one that is not, up to twice an even layer's
    assert [plan.num_extra for plan in plans([100.0] * 8, hot, [7.0] * 8)] == [0, 8, 0]
    assert [plan.num_extra for plan in plans([100.0] * 8, hot, max_share=1.0)] == [0, 4]
    assert sum(plan.num_extra for plan in plans(hot, hot, hot)) == 12
    assert plans([100.0] * 8, hot)[1].slots_G(4).max() <= ROOM.slots_G.max() + 1


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(0, 14), st.sampled_from([0.0, 0.02, 0.2]))
@settings(max_examples=60, deadline=None)
def test_craft_divides_replicas_as_well_as_any_division(seed, layers, total, least):
    rng = np.random.default_rng(seed)
    cost = np.array([0, 3, 6, 8])
    curves = [np.cumsum(rng.random(4) * rng.random() * 0.3) for _ in range(layers)]

    def worth(rounds):
        return sum(curve[n] - n * least for curve, n in zip(curves, rounds, strict=True))

    found = rounds_L(curves, cost, total, least)
    assert cost[found].sum() <= total
    every = itertools.product(range(4), repeat=layers)
    assert worth(found) == pytest.approx(max(worth(r) for r in every if sum(cost[n] for n in r) <= total))


@pytest.mark.parametrize("tokens", [60, 20_000])
def test_bound_exact_plan_and_heuristics_are_in_order(tokens):
    rng = np.random.default_rng(0)
    load = rng.multinomial(tokens, rng.dirichlet(np.full(5, 0.5)))
    # GPUs are interchangeable, which makes the search long: two of them are enough to order the answers
    spec, two = dataclasses.replace(SPEC, num_experts=5), FOUR.with_gpus(2)
    costs = COSTS.get("roofline")(spec, two)
    budget = Budget.even(5, 2, 1, spec.expert_bytes)
    best = best_plan(load, 0, Setting(spec, two, costs, budget, MilpParams()))
    assert layer_bound(load, costs.terms(), 2, 2) <= best.seconds * (1 + 1e-3)
    assert (best.plan.slots_G(2) <= budget.slots_G).all()
    for name in ("static", "eplb", "moeless", "elastic", "metro", "llep", "craft"):
        planner = PLANNERS.get(name)
        forecast = Forecast(load.astype(float), np.zeros(5), int(load.sum()), "true")
        setting = Setting(spec, two, costs, budget, planner.params())
        plan = planner.plan(PlanInput(0, Phase.PREFILL, forecast), setting)
        quota = planner.dispatch(np.stack([load, np.zeros_like(load)]), plan, np.ones(plan.R, bool), setting)
        assert terms_seconds(quota.sum(0), plan.gpu_R, costs.terms(), 2) >= best.lower_bound * (1 - 1e-6)


def test_milp_refuses_large_layers(plan_with):
    with pytest.raises(UserError, match="milp plans up to"):
        plan_with("milp", np.ones(64), 8, 1)
