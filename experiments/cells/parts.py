"""The paper's planner with parts that can be taken out, for the study of what each one is worth."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless.contracts import IntArray, LayerPlan, PlanInput
from moeless.experiments.cells import serving
from moeless.placement import PLANNERS, elastic, paper
from moeless.placement.layout import room_G, static_gpu_E
from moeless.placement.setting import Setting


@dataclass(frozen=True)
class PartsParams(paper.PaperParams):
    """Which parts of Algorithms 1 and 2 are in use.

    Attributes:
        place: Algorithm 2's shortest queue; otherwise primaries stay where static EP has them, and copies go to
            the GPUs in turn, whatever their load.
        reuse: copies stay where they are alive; otherwise every plan is made as if nothing were in memory.
        depth, fuel: of the dispatch from true counts, as in the elastic planner.
    """

    place: bool = True
    reuse: bool = True
    depth: int = 3
    fuel: int = 1000


def plan_layer(x: PlanInput, setting: Setting) -> LayerPlan:
    """Algorithms 1 and 2 as far as the parameters keep them."""
    spec, budget, params = setting.spec, setting.budget, setting.params
    if not params.reuse:
        x = dataclasses.replace(x, previous=None, state_R=None)
    if params.place:
        return paper.PLANNER.plan(x, setting)
    gpus, gpu_E = setting.cluster.num_gpus, static_gpu_E(spec.E, setting.cluster.num_gpus)
    room = room_G(budget, spec, gpus)
    extra = min(int(room.sum()) - spec.E, budget.max_extra)
    count_E = paper.scale_experts(x.forecast.mean_E, extra, params.cv_threshold, params.count_idle)
    expert_X = np.repeat(np.arange(spec.E), count_E - 1)
    gpu_X = _in_turn(len(expert_X), room - np.bincount(gpu_E, minlength=gpus))
    expert_R, gpu_R = np.concatenate([np.arange(spec.E), expert_X]), np.concatenate([gpu_E, gpu_X])
    primary_R = np.arange(len(expert_R)) < spec.E
    return LayerPlan.build(x.layer, expert_R, gpu_R, primary_R, num_experts=spec.E, num_gpus=gpus)


def _in_turn(count: int, room: IntArray) -> IntArray:
    """GPUs for so many copies, one after the other, full ones left out."""
    rounds = [gpu for turn in range(int(room.max(initial=0))) for gpu in np.flatnonzero(room > turn).tolist()]
    return np.array(rounds[:count], np.int64)


#: Even shares, as in the paper; and the same plans with our dispatch from true counts.
EVEN = dataclasses.replace(paper.PLANNER, name="parts", plan_layer=plan_layer, plan_layers=None, params=PartsParams)
CHOSEN = dataclasses.replace(EVEN, name="parts-dispatch", dispatch=elastic.DISPATCH)


def serve(params: dict[str, Any], needs: list[Any]) -> dict[str, Any]:
    """As ``serving.serve``, with the planners ``parts`` and ``parts-dispatch`` beside the others."""
    for planner in (EVEN, CHOSEN):
        PLANNERS.add(planner.name, planner)
    return serving.serve(params, needs)
