"""The exact dispatch by mixed-integer programming: the yardstick of fast dispatchers.

Axes: E experts, R replicas, G GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from moeless.contracts import BoolArray, FloatArray, Int32Array, IntArray, LayerPlan
from moeless.costs import CostTerms
from moeless.errors import RunFailed


@dataclass(frozen=True)
class ExactDispatch:
    """Optimal tokens of each replica, fractional, with the time they take and a proven lower bound on any."""

    tokens_R: FloatArray
    seconds: float
    lower_bound: float


def terms_seconds(
    tokens_R: FloatArray | IntArray, gpu_R: IntArray | Int32Array, terms: CostTerms, num_gpus: int
) -> float:
    """A layer's time by :class:`CostTerms` for tokens on replicas."""
    tokens = np.asarray(tokens_R, np.float64)
    busy = np.where(tokens > 0, np.maximum(tokens * terms.token_seconds, terms.floor_seconds), 0.0)
    if terms.reduce_max:
        expert = float(busy.max(initial=0.0))
    else:
        expert = float(np.bincount(gpu_R, weights=busy, minlength=num_gpus).max())
    most = float(np.bincount(gpu_R, weights=tokens, minlength=num_gpus).max())
    launch = terms.launch_seconds if expert > 0 else 0.0
    return expert + launch + 2 * (terms.link_seconds * most + terms.latency_seconds)


def exact_dispatch(
    load_E: IntArray,
    plan: LayerPlan,
    usable_R: BoolArray,
    terms: CostTerms,
    num_gpus: int,
    *,
    tolerance: float = 1e-4,
    time_limit: float = 60.0,
) -> ExactDispatch:
    """Tokens of each replica that end the layer first, over all choices of copies and shares.

    Minimises ``makespan + 2 * link * fullest GPU`` with ``time_r >= token_seconds * tokens_r`` and
    ``time_r >= floor_seconds`` where a copy is used. Token counts are continuous, so no rounding can beat it.

    Args:
        tolerance: relative gap at which HiGHS stops.
        time_limit: seconds for HiGHS.

    Raises:
        RunFailed: no solution within the time limit.
    """
    expert, gpu = plan.expert_R, plan.gpu_R
    load = np.asarray(load_E, np.float64)
    live = np.flatnonzero(usable_R & (load[expert] > 0))
    n = len(live)
    tokens_R = np.zeros(plan.R)
    if n == 0:
        return ExactDispatch(tokens_R, *([terms_seconds(tokens_R, gpu, terms, num_gpus)] * 2))
    # columns: tokens and use of each live copy, its time, then makespan and fullest GPU; times in units of one floor
    unit = max(terms.floor_seconds, terms.token_seconds, 1e-12)
    scale_n = load[expert[live]]
    x, y, t, makespan, fullest = np.arange(n), n + np.arange(n), 2 * n + np.arange(n), 3 * n, 3 * n + 1
    columns = 3 * n + 2
    rows: list[tuple[IntArray, FloatArray, float, float]] = []

    def row(entries: list[tuple[int, float]], low: float, high: float) -> None:
        index, value = zip(*entries, strict=True)
        rows.append((np.array(index), np.array(value, float), low, high))

    for e in np.unique(expert[live]):
        row([(int(x[i]), 1.0) for i in np.flatnonzero(expert[live] == e)], 1.0, 1.0)
    for i in range(n):
        row([(int(x[i]), 1.0), (int(y[i]), -1.0)], -np.inf, 0.0)
        row([(int(t[i]), 1.0), (int(x[i]), -terms.token_seconds * scale_n[i] / unit)], 0.0, np.inf)
        row([(int(t[i]), 1.0), (int(y[i]), -terms.floor_seconds / unit)], 0.0, np.inf)
        if terms.reduce_max:
            row([(makespan, 1.0), (int(t[i]), -1.0)], 0.0, np.inf)
    for g in np.unique(gpu[live]):
        here = np.flatnonzero(gpu[live] == g)
        if not terms.reduce_max:
            row([(makespan, 1.0), *((int(t[i]), -1.0) for i in here)], 0.0, np.inf)
        row([(fullest, 1.0), *((int(x[i]), -scale_n[i] / load.sum()) for i in here)], 0.0, np.inf)
    matrix = sparse.csr_matrix(
        (
            np.concatenate([value for _, value, _, _ in rows]),
            (np.repeat(np.arange(len(rows)), [len(index) for index, *_ in rows]), np.concatenate([r[0] for r in rows])),
        ),
        shape=(len(rows), columns),
    )
    cost = np.zeros(columns)
    cost[makespan] = 1.0
    cost[fullest] = 2 * terms.link_seconds * load.sum() / unit
    upper = np.full(columns, np.inf)
    upper[: 2 * n] = 1.0
    whole = np.zeros(columns)
    whole[y] = 1
    found = milp(
        cost,
        constraints=LinearConstraint(matrix, np.array([r[2] for r in rows]), np.array([r[3] for r in rows])),
        bounds=Bounds(np.zeros(columns), upper),
        integrality=whole,
        options={"mip_rel_gap": tolerance, "time_limit": time_limit},
    )
    if found.x is None:
        raise RunFailed(f"the exact dispatch found no solution within {time_limit:g} s")
    share = np.where(found.x[:n] > 1e-9, found.x[:n], 0.0)
    tokens_R[live] = share * scale_n
    fixed = terms.launch_seconds + 2 * terms.latency_seconds
    bound = found.mip_dual_bound if found.mip_dual_bound is not None else found.fun
    return ExactDispatch(tokens_R, float(found.fun) * unit + fixed, float(bound) * unit + fixed)
