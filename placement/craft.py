"""CRAFT: replicate only where it pays, with a replica budget for each layer.

Source: Zhao et al., "CRAFT: Cost-aware Expert Replica Allocation with Fine-Grained Layerwise Estimations",
arXiv 2603.28768, known from its abstract and from a published summary of it, not from its text: existing schemes
replicate more than pays; a layer's benefit of 0, 1, 2 ... replicas is the balancedness (mean over maximum GPU load)
that they reach; how many each layer gets under the memory of all is a multiple-choice knapsack problem, solved by
dynamic programming; experts are then assigned greedily so that all GPUs have as many places. Our reading: EPLB's
layouts; replicas in rounds of one slot on every GPU, each of which has to be worth ``min_benefit``; one layer takes at
most ``max_share`` times an even layer's replicas. A layer planned alone has its own budget only, as in the live engine,
whose memory has as many places in every layer.

Axes: L layers, E experts, G GPUs, P replicas, N rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeless.contracts import Budget, FloatArray, IntArray, LayerPlan, PlanInput
from moeless.errors import UserError
from moeless.placement import eplb
from moeless.placement.base import Planner, replace_budget
from moeless.placement.dispatch import EVEN
from moeless.placement.layout import room_G, spare_replicas
from moeless.placement.setting import Setting


@dataclass(frozen=True)
class CraftParams:
    """Parameters of the allocation.

    Attributes:
        min_benefit: balancedness that a further slot per GPU must add in a layer to be taken.
        max_share: most replicas of one layer, in units of what each layer would have if all had the same.
    """

    min_benefit: float = 0.02
    max_share: float = 2.0

    def __post_init__(self) -> None:
        if not self.min_benefit >= 0:
            raise UserError(f"min_benefit must be a number of at least 0, got {self.min_benefit}")
        if not self.max_share >= 1:
            raise UserError(f"max_share must be a number of at least 1, got {self.max_share}")


def balancedness(weight_E: FloatArray, capacity_G: IntArray) -> float:
    """Mean over maximum GPU load of EPLB's plan with as many replicas as the capacities hold; 1 without load."""
    total = int(capacity_G.sum())
    weight_P = eplb.replicate(weight_E.astype(np.float32), total).weight_P
    gpu_P, _ = eplb.pack(weight_P, capacity_G)
    load_G = np.bincount(gpu_P, weights=weight_P, minlength=len(capacity_G))
    return float(load_G.mean() / load_G.max()) if load_G.max() > 0 else 1.0


def benefits_N(weight_E: FloatArray, room: IntArray, max_extra: int) -> FloatArray:
    """Balancedness with 0, 1, 2 ... rounds of one more replica per GPU, as far as the room goes."""
    experts, gpus = len(weight_E), len(room)
    extras = [*range(0, max_extra, gpus), max_extra] if max_extra else [0]
    return np.array([balancedness(weight_E, eplb.capacities(experts + extra, room)) for extra in extras])


def rounds_L(curves: Sequence[FloatArray], cost_N: IntArray, total_extra: int, min_benefit: float) -> IntArray:
    """Rounds of each layer, ``[L]``, whose extras sum to at most ``total_extra``: most balancedness, exactly.

    A multiple-choice knapsack problem by dynamic programming over the extras. Each round counts ``min_benefit`` less
    than what it adds. Ties go to the fewest rounds.

    Args:
        curves: balancedness of each layer after 0, 1, 2 ... rounds.
        cost_N: extras of 0, 1, 2 ... rounds.
    """
    worth_X = np.zeros(total_extra + 1)
    taken_LX = np.zeros((len(curves), total_extra + 1), np.int64)
    for layer, curve in enumerate(curves):
        before_X, worth_X = worth_X, worth_X + curve[0]
        for n in range(1, len(curve)):
            cost = int(cost_N[n])
            if cost > total_extra:
                break
            with_X = before_X[: total_extra + 1 - cost] + curve[n] - n * min_benefit
            better = np.flatnonzero(with_X > worth_X[cost:] + 1e-12) + cost
            worth_X[better], taken_LX[layer, better] = with_X[better - cost], n
    rounds, left = np.zeros(len(curves), np.int64), total_extra
    for layer in range(len(curves) - 1, -1, -1):
        rounds[layer] = taken_LX[layer, left]
        left -= int(cost_N[rounds[layer]])
    return rounds


def share_budget(inputs_L: Sequence[PlanInput], setting: Setting) -> list[Budget]:
    """Room of each layer, out of as much as all have together where each has ``budget``.

    Raises:
        UserError: the experts do not fit.
    """
    spec, budget, params, gpus = setting.spec, setting.budget, setting.params, setting.cluster.num_gpus
    room = room_G(budget, spec, gpus)
    even = spare_replicas(room, spec.E, budget.max_extra)
    most = int(even * params.max_share)
    # rounds past the even layer's widen every GPU alike
    wider = -(-(most - even) // gpus)
    cost_N = np.array([*range(0, most, gpus), most] if most else [0])
    curves = [benefits_N(x.forecast.mean_E, room + wider, most) for x in inputs_L]
    budgets = []
    for taken in cost_N[rounds_L(curves, cost_N, even * len(curves), params.min_benefit)].tolist():
        over = max(0, -(-(taken - even) // gpus))
        budgets.append(Budget(budget.slots_G + over, budget.bytes_G + float(over * spec.expert_bytes), taken))
    return budgets


def plan_layer(x: PlanInput, setting: Setting) -> LayerPlan:
    """EPLB with as many rounds of replicas as still gain ``min_benefit`` each, up to the budget.

    Raises:
        UserError: the experts do not fit.
    """
    spec, budget, params, gpus = setting.spec, setting.budget, setting.params, setting.cluster.num_gpus
    room = room_G(budget, spec, gpus)
    max_extra = spare_replicas(room, spec.E, budget.max_extra)
    curve = benefits_N(x.forecast.mean_E, room, max_extra)
    rounds = 0
    for n in range(1, len(curve)):
        if curve[n] - curve[rounds] >= params.min_benefit * (n - rounds):
            rounds = n
    taken = min(rounds * gpus, max_extra)
    return eplb.plan_layer(x, replace_budget(setting, Budget(budget.slots_G, budget.bytes_G, taken)))


PLANNER = Planner(
    name="craft",
    plan_layer=plan_layer,
    dispatch=EVEN,
    params=CraftParams,
    cadence="interval",
    needs_forecast=True,
    default_predictor="history",
    source="CRAFT, arXiv 2603.28768; layouts by EPLB",
    share_budget=share_budget,
)
