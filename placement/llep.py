"""LLEP: experts stay at home, overloaded GPUs spill tokens to the least loaded ones.

Source: Nguyen et al., "Least-Loaded Expert Parallelism", arXiv 2601.17111, and github.com/SalesforceAIResearch/
LeastLoadedEP (its defaults: alpha 1.0, m 1024, lambda 1.3). Below an imbalance of lambda static EP is kept. Otherwise
experts, by decreasing load, keep at home what fits under alpha times the mean GPU load, counting what experts still
to come bring with them; the rest goes to the least loaded GPUs in chunks of at least m tokens, or all that is left of
it. LLEP ships an expert's weights after the gate; here copies must be there in time, which is our reading: placement
runs the same assignment on the forecast and keeps the copies that it spills to, dispatch spills to those only, and
what none of them has room for goes where it ends sooner, home or the least loaded of them.

Axes: S source ranks, E experts, R replicas, G GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless.contracts import BoolArray, FloatArray, IntArray, LayerPlan, PlanInput
from moeless.errors import UserError
from moeless.placement.base import Planner
from moeless.placement.dealing import quotas_of_totals, serving_R
from moeless.placement.dispatch import DispatchRule
from moeless.placement.layout import check_static_fits, room_G, spare_replicas, static_gpu_E
from moeless.placement.setting import Setting


@dataclass(frozen=True)
class LlepParams:
    """The paper's knobs.

    Attributes:
        capacity: alpha, load that a GPU may take in units of the mean load.
        min_tokens: m, the smallest chunk worth a separate matrix product.
        imbalance: lambda, maximum over mean of GPU loads below which static EP is kept.
    """

    capacity: float = 1.0
    min_tokens: int = 1024
    imbalance: float = 1.3

    def __post_init__(self) -> None:
        if not (self.capacity >= 1 and self.min_tokens >= 1 and self.imbalance >= 1):
            raise UserError("capacity, min_tokens and imbalance of llep must be at least 1")


def spill(load_E: FloatArray, home_E: IntArray, allowed_EG: BoolArray, params: LlepParams) -> FloatArray:
    """Tokens of each expert on each GPU, ``[E, G]``; ``allowed_EG`` marks where copies may work besides home.

    Whole where the loads are.
    """
    experts, gpus = allowed_EG.shape
    tokens_EG = np.zeros((experts, gpus))
    tokens_EG[np.arange(experts), home_E] = load_E
    total_G = tokens_EG.sum(0)
    mean = total_G.mean()
    if mean == 0 or total_G.max() < params.imbalance * mean:
        return tokens_EG
    capacity = max(np.floor(params.capacity * np.floor(mean)), 1.0)
    for e in np.argsort(-load_E, kind="stable"):
        g = home_E[e]
        helpers = np.flatnonzero(allowed_EG[e] & (np.arange(gpus) != g))
        while (rest := min(total_G[g] - capacity, tokens_EG[e, g])) > 0 and len(helpers):
            by_load = helpers[np.argsort(total_G[helpers], kind="stable")]
            chunk_H = np.minimum(rest, capacity - total_G[by_load])
            fits_H = (chunk_H > 0) & ((chunk_H >= params.min_tokens) | (chunk_H == rest))
            if fits_H.any():
                first = int(np.argmax(fits_H))
                h, chunk = by_load[first], chunk_H[first]
            else:
                h, chunk = by_load[0], rest
                if total_G[h] + rest >= total_G[g]:
                    break
            tokens_EG[e, g] -= chunk
            tokens_EG[e, h] += chunk
            total_G[g] -= chunk
            total_G[h] += chunk
            if not fits_H.any():
                break
    return tokens_EG


def plan_layer(x: PlanInput, setting: Setting) -> LayerPlan:
    """Static primaries and a copy wherever the forecast's load would spill to, largest spills first.

    Raises:
        UserError: a GPU has no room for its static experts.
    """
    spec, budget, params, gpus = setting.spec, setting.budget, setting.params, setting.cluster.num_gpus
    home_E = static_gpu_E(spec.E, gpus)
    room = room_G(budget, spec, gpus)
    check_static_fits(room, home_E)
    left = spare_replicas(room, spec.E, budget.max_extra)
    spare_G = room - np.bincount(home_E, minlength=gpus)
    tokens_EG = spill(x.forecast.mean_E, home_E, np.ones((spec.E, gpus), np.bool_), params)
    tokens_EG[np.arange(spec.E), home_E] = 0.0
    expert, gpu = list(range(spec.E)), home_E.tolist()
    for flat in np.argsort(-tokens_EG.reshape(-1), kind="stable"):
        e, g = divmod(int(flat), gpus)
        if left == 0 or tokens_EG[e, g] <= 0:
            break
        if spare_G[g] > 0:
            expert.append(e)
            gpu.append(g)
            spare_G[g] -= 1
            left -= 1
    primary = np.arange(len(expert)) < spec.E
    return LayerPlan.build(x.layer, expert, gpu, primary, num_experts=spec.E, num_gpus=gpus)


def dispatch(load_SE: IntArray, plan: LayerPlan, usable_R: BoolArray, setting: Setting) -> IntArray:
    """Static EP, with what overloads a GPU spilled to the usable copies, ``[S, R]`` tokens.

    Raises:
        UserError: ``usable_R`` does not match the plan.
    """
    experts, gpus = load_SE.shape[1], setting.cluster.num_gpus
    serving = serving_R(plan, usable_R, experts)
    home_R = np.full(experts, -1, np.int64)
    # the primary where it serves, otherwise the first copy that does
    for r in np.flatnonzero(serving)[::-1]:
        home_R[plan.expert_R[r]] = r
    primaries = np.flatnonzero(serving & plan.primary_R)
    home_R[plan.expert_R[primaries]] = primaries
    allowed_EG = np.zeros((experts, gpus), np.bool_)
    allowed_EG[plan.expert_R[serving], plan.gpu_R[serving]] = True
    home_E = plan.gpu_R[home_R].astype(np.int64)
    tokens_EG = spill(load_SE.sum(0).astype(np.float64), home_E, allowed_EG, setting.params)
    tokens_R = np.zeros(plan.R, np.int64)
    for r in np.flatnonzero(serving):
        e, g = plan.expert_R[r], plan.gpu_R[r]
        # two copies of an expert on one GPU: one of them takes all
        if r == home_R[e] or g != home_E[e]:
            tokens_R[r] = round(tokens_EG[e, g])
            tokens_EG[e, g] = 0
    quota_SR = np.empty((load_SE.shape[0], plan.R), np.int64)
    quotas_of_totals(load_SE, plan.expert_R, plan.gpu_R, plan.primary_R, serving, gpus, tokens_R, quota_SR)
    return quota_SR


PLANNER = Planner(
    name="llep",
    plan_layer=plan_layer,
    dispatch=DispatchRule(gathers_counts=True, quotas=dispatch),
    params=LlepParams,
    cadence="interval",
    needs_forecast=True,
    default_predictor="history",
    source="LLEP, arXiv 2601.17111; copies placed ahead instead of shipped after the gate",
)
