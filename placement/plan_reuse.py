"""Which layers' plans a new forecast leaves as they are, so that their planner need not be asked.

Axes: L layers, E experts, C scenarios.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeless.contracts import BoolArray, FloatArray, IntArray
from moeless.jit import njit
from moeless.placement.dispatch_search import Rates
from moeless.placement.plan_scoring import draw_scenarios, score_static


class ReuseTerms(NamedTuple):
    """What the test needs of a planner; ``active`` False turns it off.

    Attributes:
        planned_LE: forecast mean loads that the plans in force were made for.
        plain_L: whether a plan is static EP's.
        tolerance: relative change of a forecast that keeps its plan.
        normal_CE, doubt: standard normal deviates of the planner's scenarios, and the least relative spread.
        gpu_E: static GPU of each expert; ``extra`` replicas more may be held.
        a, b, c: seconds per token, weight read and exchange per token, as its search takes them.
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


def never(layers: int, experts: int) -> ReuseTerms:
    """For planners that are to be asked each time."""
    return ReuseTerms(
        False, np.zeros((layers, experts)), np.zeros(layers, np.bool_), 0.0, np.zeros((0, experts)), 0.0,
        np.zeros(experts, np.int64), 1, 0, 0.0, 0.0, 0.0, np.full(layers, -1.0),
    )  # fmt: skip


@njit(cache=True, nogil=True, allocates=False)
def hardly_changed(mean_E, planned_E, tolerance):  # type: ignore[no-untyped-def]
    """Whether two forecasts differ by at most ``tolerance`` of the tokens that the first one was made for."""
    change, tokens = 0.0, 0.0
    for e in range(len(mean_E)):
        change += abs(mean_E[e] - planned_E[e])
        tokens += planned_E[e]
    return tokens > 0.0 and change <= tolerance * tokens


@njit(cache=True, nogil=True, inner=True)
def _stays_static(layer, mean_E, var_E, terms):  # type: ignore[no-untyped-def]
    """Whether a layer has static EP's plan and its planner would skip it again; see :func:`keeps_plan`."""
    planned_E, experts, scenarios = terms.planned_LE[layer], len(mean_E), len(terms.normal_CE)
    if not terms.plain_L[layer]:
        return False
    if terms.extra == 0 or terms.num_gpus == 1:
        return True
    if scenarios == 0 or terms.skip_L[layer] < 0.0:
        return False
    load_CE = np.empty((scenarios, experts), np.int64)
    drawn = draw_scenarios(mean_E, var_E, terms.doubt, terms.normal_CE, load_CE)
    judged = score_static(load_CE[:drawn], terms.gpu_E, terms.num_gpus, terms.extra, Rates(terms.a, terms.b, terms.c))
    # not even the best plan there could be would pay
    if judged.static_seconds - judged.rest_C[0] > terms.skip_L[layer]:
        return False
    # as good as made for this forecast: the next one is compared with it
    for e in range(experts):
        planned_E[e] = mean_E[e]
    return True


@njit(cache=True, nogil=True)
def keeps_plan(layer, mean_E, var_E, terms):  # type: ignore[no-untyped-def]
    """Whether a layer's plan stays for this forecast.

    It does where its forecast hardly changed, or where it is static EP's and the planner would skip the layer again;
    that one then counts as made for this forecast.
    """
    if not terms.active:
        return False
    if hardly_changed(mean_E, terms.planned_LE[layer], terms.tolerance):
        return True
    return _stays_static(layer, mean_E, var_E, terms)


@njit(cache=True, nogil=True)
def keeps_plans(layer_N, mean_NE, var_NE, terms, kept_N):  # type: ignore[no-untyped-def]
    """:func:`keeps_plan` of several layers."""
    for n in range(len(layer_N)):
        kept_N[n] = keeps_plan(layer_N[n], mean_NE[n], var_NE[n], terms)


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _expected(weight, total, assignments, experts):  # type: ignore[no-untyped-def]
    """An expert's load by history's forecast."""
    return weight / total * assignments if total > 0.0 else assignments / experts


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _history_hardly_changed(weight_LE, assignments, terms, kept_L):  # type: ignore[no-untyped-def]
    """Mark the layers whose forecasts from history hardly changed; returns whether all did."""
    layers, experts = weight_LE.shape
    every = True
    for layer in range(layers):
        total, change, tokens = 0.0, 0.0, 0.0
        for e in range(experts):
            total += weight_LE[layer, e]
        for e in range(experts):
            planned = terms.planned_LE[layer, e]
            change += abs(_expected(weight_LE[layer, e], total, assignments, experts) - planned)
            tokens += planned
        kept_L[layer] = tokens > 0.0 and change <= terms.tolerance * tokens
        every = every and kept_L[layer]
    return every


@njit(cache=True, nogil=True)
def history_keeps_plans(weight_LE, assignments, terms, kept_L):  # type: ignore[no-untyped-def]
    """:func:`keeps_plan` of all layers for forecasts from history, terms that are active; returns whether all are kept.

    The forecast is ``assignments`` in proportion to ``weight_LE`` (equal shares where a row is zero), and states
    counting noise.
    """
    if _history_hardly_changed(weight_LE, assignments, terms, kept_L):
        return True
    layers, experts = weight_LE.shape
    mean_E, every = np.empty(experts), True
    for layer in range(layers):
        if not kept_L[layer]:
            total = 0.0
            for e in range(experts):
                total += weight_LE[layer, e]
            for e in range(experts):
                mean_E[e] = _expected(weight_LE[layer, e], total, assignments, experts)
            kept_L[layer] = _stays_static(layer, mean_E, mean_E, terms)
        every = every and kept_L[layer]
    return every


@njit(cache=True, nogil=True)
def note_plans(layer_N, mean_NE, rows, terms):  # type: ignore[no-untyped-def]
    """Remember for which forecasts plans were made, and which of them are static EP's."""
    experts = mean_NE.shape[1]
    for n in range(len(layer_N)):
        planned_E, count, plain = terms.planned_LE[layer_N[n]], rows.count_N[n], rows.count_N[n] == experts
        for e in range(experts):
            planned_E[e] = mean_NE[n, e]
        for r in range(count):
            plain = plain and terms.gpu_E[rows.expert_NR[n, r]] == rows.gpu_NR[n, r]
        terms.plain_L[layer_N[n]] = plain
