"""Equal shares: every usable copy of an expert serves the same number of its tokens.

Axes: S source ranks, E experts, R replicas.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeless.cluster import Cluster
from moeless.contracts import BoolArray, IntArray, LayerPlan
from moeless.costs import CostModel
from moeless.errors import UserError
from moeless.jit import njit
from moeless.placement.base import DispatchRule
from moeless.spec import MoESpec


def serving_R(plan: LayerPlan, usable_R: BoolArray, num_experts: int) -> BoolArray:
    """The copies that may serve, ``[R]``: the usable ones, or the primary of an expert that has none.

    A primary that is not usable yet has to be waited for; the caller accounts for that stall.
    """
    usable = np.asarray(usable_R, np.bool_)
    if usable.shape != plan.expert_R.shape:
        raise UserError(f"usable marks must be one per replica: {plan.R} replicas, got shape {usable.shape}")
    if usable.all():
        return usable
    alive_E = np.bincount(plan.expert_R[usable], minlength=num_experts) > 0
    return np.asarray(usable | (plan.primary_R & ~alive_E[plan.expert_R]))


@njit(cache=True, nogil=True)
def _round_robin(load_SE, expert_R, serving, quota_SR):  # type: ignore[no-untyped-def]
    num_sources, num_experts = load_SE.shape
    copies_E = np.zeros(num_experts, np.int64)
    index_R = np.zeros(len(expert_R), np.int64)
    for r in range(len(expert_R)):
        if serving[r]:
            index_R[r] = copies_E[expert_R[r]]
            copies_E[expert_R[r]] += 1
    before_E = np.zeros(num_experts, np.int64)
    for s in range(num_sources):
        for r in range(len(expert_R)):
            if serving[r]:
                e = expert_R[r]
                n, k = load_SE[s, e], copies_E[e]
                # tokens before_E .. before_E + n of the expert, of which every k-th is this copy's
                first = (index_R[r] - before_E[e]) % k
                if n > first:
                    quota_SR[s, r] = (n - first + k - 1) // k
        for e in range(num_experts):
            before_E[e] += load_SE[s, e]


def even_dispatch(
    load_SE: IntArray,
    plan: LayerPlan,
    usable_R: BoolArray,
    *,
    spec: MoESpec,
    cluster: Cluster,
    costs: CostModel | None = None,
    params: Any = None,
) -> IntArray:
    """Equal shares over an expert's usable copies, ``[S, R]`` tokens.

    An expert's tokens, taken in order of source rank, go to its copies in turn: every source rank's tokens and
    their total are both split so that no two copies differ by more than one token, the lowest index having more.

    Raises:
        UserError: ``usable_R`` does not match the plan.
    """
    quota_SR = np.zeros((load_SE.shape[0], plan.R), np.int64)
    serving = serving_R(plan, usable_R, load_SE.shape[1])
    _round_robin(np.ascontiguousarray(load_SE, np.int64), plan.expert_R, serving, quota_SR)
    return quota_SR


#: Each rank splits its own tokens: nothing is gathered.
EVEN = DispatchRule(even_dispatch, gathers_counts=False)
