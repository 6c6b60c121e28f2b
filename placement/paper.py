"""The paper's planner: scale experts until their replicas' loads are even, then join the shortest queue.

Algorithms 1 and 2 of MoEless (arXiv 2603.06350). What the paper leaves open is a parameter.

Axes: E experts, P replicas in order of decision, R replicas in a plan's order, G GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moeless.contracts import BoolArray, FloatArray, InstanceState, Int32Array, IntArray
from moeless.errors import UserError
from moeless.jit import njit
from moeless.placement.base import Planner
from moeless.placement.dispatch import EVEN
from moeless.placement.layout import room_G, spare_replicas
from moeless.placement.plan_rows import PlanBatch, PlanRows, empty_rows
from moeless.placement.setting import Setting

_WARM, _LOADING = int(InstanceState.WARM), int(InstanceState.LOADING)


@dataclass(frozen=True)
class PaperParams:
    """Parameters of Algorithms 1 and 2.

    Attributes:
        cv_threshold: V, the coefficient of variation of replica loads at which scaling stops (the paper: 0.2).
        count_idle: whether experts without load count in it; with them small batches scale to the cap.
        memory_cap_bytes: M_cap, bytes of extra replicas of a layer; None leaves the budget alone to cap.
        overshoot: the printed loop tests the cap before it adds, so its last replica may pass a cap that is no
            multiple of the expert's size; False keeps within the cap. The budget holds either way.
        memory_check: skip full GPUs in placement. The algorithm prints no check, its constraints demand one.
    """

    cv_threshold: float = 0.2
    count_idle: bool = False
    memory_cap_bytes: float | None = None
    overshoot: bool = False
    memory_check: bool = True

    def __post_init__(self) -> None:
        if not self.cv_threshold >= 0:
            raise UserError(f"cv_threshold must be a number of at least 0, got {self.cv_threshold}")
        if self.memory_cap_bytes is not None and not self.memory_cap_bytes >= 0:
            raise UserError(f"memory_cap_bytes must be a number of at least 0, got {self.memory_cap_bytes}")

    def max_extra(self, expert_bytes: int) -> int | None:
        """Extras that M_cap allows, None for any number."""
        if self.memory_cap_bytes is None:
            return None
        whole = self.memory_cap_bytes / expert_bytes
        return int(np.ceil(whole) if self.overshoot else np.floor(whole))


class PaperTerms(NamedTuple):
    """What both algorithms need beside the forecast.

    Attributes:
        max_extra: copies beyond one of each expert, at most.
        threshold, count_idle, memory_check: as in ``PaperParams``.
        room_G: replicas that each GPU may hold.
    """

    max_extra: int
    threshold: float
    count_idle: bool
    memory_check: bool
    room_G: IntArray


@njit(cache=True, nogil=True)
def scale_experts(load_E: FloatArray, max_extra: int, cv_threshold: float = 0.2, count_idle: bool = False) -> IntArray:
    """Algorithm 1: copies of each expert, ``[E]``.

    While fewer than ``max_extra`` copies were added and the coefficient of variation of replica loads exceeds
    the threshold, the expert with the most loaded replica gets one more; ties go to the lowest index.
    """
    count_E, total, squares, replicas = np.ones(len(load_E), np.int64), 0.0, 0.0, 0
    for e in range(len(load_E)):
        total += load_E[e]
        squares += load_E[e] * load_E[e]
        if count_idle or load_E[e] > 0:
            replicas += 1
    for _ in range(max_extra if total > 0.0 else 0):
        # CV^2 = E[x^2] / E[x]^2 - 1 over replicas that carry load_e / count_e each
        if replicas * squares / (total * total) - 1.0 <= cv_threshold * cv_threshold:
            break
        hottest = 0
        for e in range(1, len(load_E)):
            if load_E[e] / count_E[e] > load_E[hottest] / count_E[hottest]:
                hottest = e
        squares -= load_E[hottest] * load_E[hottest] / (count_E[hottest] * (count_E[hottest] + 1.0))
        count_E[hottest] += 1
        replicas += 1
    return count_E


@njit(cache=True, nogil=True)
def place_replicas(load_P: FloatArray, expert_P: IntArray, room_G: IntArray, alive_EG: IntArray) -> IntArray:
    """Algorithm 2: the GPU of each replica, ``[P]``, for replicas in order of decreasing load.

    A replica stays on a GPU that has an unused live copy of its expert (the least loaded such GPU), otherwise it
    joins the least loaded GPU that has room; ties go to the lowest index. The live copies that it uses are taken out
    of ``alive_EG``.
    """
    num_gpus, gpu_P = len(room_G), np.empty(len(load_P), np.int64)
    total_G, used_G = np.zeros(num_gpus), np.zeros(num_gpus, np.int64)
    for p in range(len(load_P)):
        expert, best = expert_P[p], -1
        for g in range(num_gpus):
            room = alive_EG[expert, g] > 0 and used_G[g] < room_G[g]
            if room and (best < 0 or total_G[g] < total_G[best]):
                best = g
        if best >= 0:
            alive_EG[expert, best] -= 1
        else:
            for g in range(num_gpus):
                if used_G[g] < room_G[g] and (best < 0 or total_G[g] < total_G[best]):
                    best = g
        gpu_P[p] = best
        used_G[best] += 1
        total_G[best] += load_P[p]
    return gpu_P


@njit(cache=True, nogil=True)
def plan_copies(
    load_E: FloatArray,
    terms: PaperTerms,
    alive_EG: IntArray,
    expert_R: Int32Array,
    gpu_R: Int32Array,
    primary_R: BoolArray,
) -> int:
    """Both algorithms, into arrays that have room; returns the number of replicas, which are in a plan's order.

    An expert's first placed replica is its primary. ``alive_EG`` are live copies before, and is used up.
    """
    num_gpus = len(terms.room_G)
    count_E = scale_experts(load_E, terms.max_extra, terms.threshold, terms.count_idle)
    replicas, at = 0, 0
    for e in range(len(load_E)):
        replicas += count_E[e]
    load_P, expert_P, first_P = np.empty(replicas), np.empty(replicas, np.int64), np.empty(replicas, np.bool_)
    # the heaviest replicas first, ties by expert
    for e in np.argsort(-load_E / count_E, kind="mergesort"):
        for copy in range(count_E[e]):
            load_P[at], expert_P[at], first_P[at] = load_E[e] / count_E[e], e, copy == 0
            at += 1
    room_G = terms.room_G if terms.memory_check else np.full(num_gpus, replicas, np.int64)
    gpu_P = place_replicas(load_P, expert_P, room_G, alive_EG)
    at_G = np.zeros(num_gpus + 1, np.int64)
    for p in range(replicas):
        at_G[gpu_P[p] + 1] += 1
    for g in range(num_gpus):
        at_G[g + 1] += at_G[g]
    first_G = at_G.copy()
    for p in range(replicas):
        e, g, primary = expert_P[p], gpu_P[p], first_P[p]
        i = at_G[g]
        at_G[g] += 1
        while i > first_G[g] and (
            (primary and not primary_R[i - 1]) or (primary == primary_R[i - 1] and e < expert_R[i - 1])
        ):
            expert_R[i], gpu_R[i], primary_R[i] = expert_R[i - 1], gpu_R[i - 1], primary_R[i - 1]
            i -= 1
        expert_R[i], gpu_R[i], primary_R[i] = e, g, primary
    return replicas


@njit(cache=True, nogil=True)
def plan_all_copies(mean_NE, previous, terms, rows):  # type: ignore[no-untyped-def]
    """:func:`plan_copies` for each layer of a batch, into its row."""
    experts, num_gpus = mean_NE.shape[1], len(terms.room_G)
    for n in range(len(mean_NE)):
        alive_EG = np.zeros((experts, num_gpus), np.int64)
        for p in range(previous.first_N[n], previous.first_N[n + 1]):
            if previous.state_P[p] == _WARM or previous.state_P[p] == _LOADING:
                alive_EG[previous.expert_P[p], previous.gpu_P[p]] += 1
        rows.count_N[n] = plan_copies(
            mean_NE[n], terms, alive_EG, rows.expert_NR[n], rows.gpu_NR[n], rows.primary_NR[n]
        )
        rows.fixed_N[n] = False


def plan_terms(setting: Setting) -> PaperTerms:
    """The compiled algorithms' numbers.

    Raises:
        UserError: the experts do not fit.
    """
    spec, budget, params = setting.spec, setting.budget, setting.params
    room = room_G(budget, spec, setting.cluster.num_gpus)
    max_extra, cap = spare_replicas(room, spec.E, budget.max_extra), params.max_extra(spec.expert_bytes)
    return PaperTerms(
        max_extra if cap is None else min(max_extra, cap), float(params.cv_threshold), bool(params.count_idle),
        bool(params.memory_check), room,
    )  # fmt: skip


def plan_layers(batch: PlanBatch, setting: Setting) -> PlanRows:
    """Algorithms 1 and 2; an expert's first placed replica is its primary.

    Raises:
        UserError: the experts do not fit.
    """
    terms = setting.derived(plan_terms)
    rows = empty_rows(len(batch), setting.spec.E + terms.max_extra)
    plan_all_copies(batch.mean_NE, batch.previous, terms, rows)
    return rows


PLANNER = Planner(
    name="moeless",
    plan_layers=plan_layers,
    dispatch=EVEN,
    params=PaperParams,
    cadence="iteration",
    needs_forecast=True,
    default_predictor="layer_aware",
    source="MoEless, arXiv 2603.06350, Algorithms 1 and 2",
    timed_as="moeless",
)
