"""Compiled test of which layers' plans a new forecast leaves as they are.

Axes: L layers, E experts, C scenarios.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeless.contracts import BoolArray, FloatArray, IntArray
from moeless.jit import njit
from moeless.placement.dispatch_search import Rates
from moeless.placement.plan_scoring import draw_scenarios, score_static


class KeepTerms(NamedTuple):
    """What the test needs of the elastic planner; ``active`` False turns it off.

    Attributes:
        planned_LE: forecast mean loads that the plans in force were made for.
        plain_L: whether a plan is static EP's.
        tolerance: relative change of a forecast that keeps its plan.
        normal_CE, doubt: standard normal deviates of the planner's scenarios, and the least relative spread.
        gpu_E: static GPU of each expert; ``extra`` replicas more may be held.
        skip_L: seconds below which no plan but static EP's pays; negative: no layer is skipped.
    """

    active: bool
    planned_LE: FloatArray
    plain_L: BoolArray
    tolerance: float
    normal_CE: FloatArray
    doubt: float
    gpu_E: IntArray
    num_gpus: int
    extra: int
    a: float
    b: float
    c: float
    skip_L: FloatArray


@njit(cache=True, nogil=True)
def hardly_changed(mean_E, planned_E, tolerance):  # type: ignore[no-untyped-def]
    """Whether two forecasts differ by at most ``tolerance`` of the tokens that the first one was made for."""
    change, tokens = 0.0, 0.0
    for e in range(len(mean_E)):
        change += abs(mean_E[e] - planned_E[e])
        tokens += planned_E[e]
    return tokens > 0.0 and change <= tolerance * tokens


@njit(cache=True, nogil=True)
def kept_layers(weight_LE, assignments, terms, kept_L):  # type: ignore[no-untyped-def]
    """Fill ``kept_L``; returns whether every plan is kept.

    The forecast is ``assignments`` in proportion to ``weight_LE`` (equal shares where a row is zero). A plan is kept
    where its forecast hardly changed, or where it is static EP's and the planner would skip the layer again; that one
    then counts as made for this forecast.
    """
    layers, experts = weight_LE.shape
    scenarios = len(terms.normal_CE)
    mean_E = np.empty(experts)
    load_CE = np.empty((scenarios, experts), np.int64)
    every = True
    for layer in range(layers):
        total = weight_LE[layer].sum()
        for e in range(experts):
            mean_E[e] = weight_LE[layer, e] / total * assignments if total > 0.0 else assignments / experts
        kept = hardly_changed(mean_E, terms.planned_LE[layer], terms.tolerance)
        if not kept and terms.plain_L[layer]:
            if terms.extra == 0 or terms.num_gpus == 1:
                kept = True
            elif scenarios > 0 and terms.skip_L[layer] >= 0.0:
                # history's forecasts state counting noise
                draw_scenarios(mean_E, mean_E, terms.doubt, terms.normal_CE, load_CE)
                rates = Rates(terms.a, terms.b, terms.c)
                judged = score_static(load_CE, terms.gpu_E, terms.num_gpus, terms.extra, rates)
                kept = judged.static_seconds - judged.bound_C.sum() <= terms.skip_L[layer]
                if kept:
                    # as good as made for this forecast: the next one is compared with it
                    terms.planned_LE[layer] = mean_E
        kept_L[layer] = kept
        every = every and kept
    return every
