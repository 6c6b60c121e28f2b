"""The best plan there is for known loads, by mixed-integer programming: a yardstick, not a policy.

Copies, their GPUs and the shares of the tokens are chosen together, for the forecast's mean taken as the true load.
Axes: E experts, G GPUs; variables are share, use, time of each (expert, GPU) pair, then makespan, fullest GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from moeless.contracts import FloatArray, LayerPlan, PlanInput
from moeless.errors import RunFailed, UserError
from moeless.placement.base import Planner
from moeless.placement.elastic import DISPATCH
from moeless.placement.layout import room_G, spare_replicas
from moeless.placement.setting import Setting

#: (expert, GPU) pairs up to which HiGHS finds optima in seconds.
LARGEST = 128


@dataclass(frozen=True)
class MilpParams:
    """Parameters of the search, with those of the dispatch that serves its plans.

    Attributes:
        tolerance: relative gap at which HiGHS stops.
        time_limit: seconds for HiGHS.
    """

    tolerance: float = 1e-3
    time_limit: float = 60.0
    depth: int = 3
    fuel: int = 4000


@dataclass(frozen=True)
class BestPlan:
    """An optimal plan, its time and a proven lower bound on any plan's, seconds."""

    plan: LayerPlan
    seconds: float
    lower_bound: float


def best_plan(load_E: FloatArray, layer: int, setting: Setting) -> BestPlan:
    """Least ``makespan + 2 * link * fullest GPU`` over all plans within the budget; shares are continuous.

    Raises:
        UserError: the instance is too large, or the experts do not fit.
        RunFailed: no plan within the time limit.
    """
    spec, params, terms = setting.spec, setting.params, setting.costs.terms()
    experts, gpus = spec.E, setting.cluster.num_gpus
    if experts * gpus > LARGEST:
        raise UserError(f"milp plans up to {LARGEST} pairs of experts and GPUs, this layer has {experts * gpus}")
    room = room_G(setting.budget, spec, gpus)
    extra = spare_replicas(room, experts, setting.budget.max_extra)
    load = np.asarray(load_E, np.float64)
    total, pairs = max(load.sum(), 1.0), experts * gpus
    unit = max(terms.floor_seconds, terms.token_seconds)
    share, use, time = (sparse.eye(pairs, format="csr") for _ in range(3))
    none, column = sparse.csr_matrix((pairs, pairs)), sparse.csr_matrix((pairs, 1))
    load_P = np.repeat(load, gpus)
    of_expert = sparse.kron(sparse.eye(experts), np.ones((1, gpus)), format="csr")
    of_gpu = sparse.kron(np.ones((1, experts)), sparse.eye(gpus), format="csr")
    empty_e, empty_g = sparse.csr_matrix((experts, pairs)), sparse.csr_matrix((gpus, pairs))
    one_g, zero_g, zero_e = np.ones((gpus, 1)), np.zeros((gpus, 1)), np.zeros((experts, 1))
    rate = sparse.diags(load_P * terms.token_seconds / unit)
    floor = sparse.diags(np.where(load_P > 0, terms.floor_seconds / unit, 0.0))
    makespan = (
        sparse.hstack([none, none, -time, np.ones((pairs, 1)), column])
        if terms.reduce_max
        else sparse.hstack([empty_g, empty_g, -of_gpu, one_g, zero_g])
    )
    blocks = [
        (sparse.hstack([of_expert, empty_e, empty_e, zero_e, zero_e]), 1.0, 1.0),
        (sparse.hstack([share, -use, none, column, column]), -np.inf, 0.0),
        (sparse.hstack([-rate, none, time, column, column]), 0.0, np.inf),
        (sparse.hstack([none, -floor, time, column, column]), 0.0, np.inf),
        (makespan, 0.0, np.inf),
        (sparse.hstack([-of_gpu @ sparse.diags(load_P / total), empty_g, empty_g, zero_g, one_g]), 0.0, np.inf),
        (sparse.hstack([empty_g, of_gpu, empty_g, zero_g, zero_g]), 0.0, room.astype(float)),
        (sparse.csr_matrix(np.r_[np.zeros(pairs), np.ones(pairs), np.zeros(pairs + 2)]), 0.0, float(experts + extra)),
    ]
    found = milp(
        np.r_[np.zeros(3 * pairs), 1.0, 2 * terms.link_seconds * total / unit],
        constraints=[LinearConstraint(sparse.csr_matrix(rows), low, high) for rows, low, high in blocks],
        bounds=Bounds(0.0, np.r_[np.ones(2 * pairs), np.full(pairs + 2, np.inf)]),
        integrality=np.r_[np.zeros(pairs), np.ones(pairs), np.zeros(pairs + 2)],
        options={"mip_rel_gap": params.tolerance, "time_limit": params.time_limit},
    )
    if found.x is None:
        raise RunFailed(f"milp found no plan within {params.time_limit:g} s")
    held_EG = found.x[pairs : 2 * pairs].reshape(experts, gpus) > 0.5
    expert, gpu = np.nonzero(held_EG)
    primary = np.r_[True, expert[1:] != expert[:-1]]
    fixed = terms.launch_seconds + 2 * terms.latency_seconds
    return BestPlan(
        LayerPlan.build(layer, expert, gpu, primary, num_experts=experts, num_gpus=gpus),
        float(found.fun) * unit + fixed,
        float(found.mip_dual_bound) * unit + fixed,
    )


def plan_layer(x: PlanInput, setting: Setting) -> LayerPlan:
    """The best plan for the forecast's mean; see :func:`best_plan` for what it raises."""
    return best_plan(x.forecast.mean_E, x.layer, setting).plan


PLANNER = Planner(
    name="milp",
    plan_layer=plan_layer,
    dispatch=DISPATCH,
    params=MilpParams,
    cadence="interval",
    needs_forecast=True,
    default_predictor="history",
    source="exact optimum by HiGHS (scipy.optimize.milp), small sizes only",
)
