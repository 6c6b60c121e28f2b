"""Gap closed by the planners where times are those of a measured profile; needs no device.

The protocol's iterations, history and split (``gap_protocol.py``); a layer's time is the measured cost model's, with
its exchange, control zero or charged. In place of the protocol's bound stands what a layer would take if every GPU had
an equal part of the work at the cheapest rate that the profile holds, and of the bytes.

Axes: I iterations, L layers, B (iteration, layer) pairs, E experts, S source ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gap_protocol import REGIMES, Regime, Routing, gap_closed, history_share_LE, sample_iterations
from gpu_layers import RANKS, loads_by_source, plan_for, quotas, setting_of

from moeless.contracts import FloatArray, LayerPlan
from moeless.costs.measured import MeasuredCosts
from moeless.placement import PLANNERS

#: Part of static EP's time below which a gap closed says nothing.
LEAST_ROOM = 0.02
PLANNERS_SHOWN = ("static", "eplb", "moeless", "craft", "elastic", "elastic-ahead")


@dataclass(frozen=True)
class GapCell:
    """One (regime, planner) under measured costs; gap closed with its bootstrap 90 % interval.

    Gaps are None where balance leaves less than 2 % of static EP's time to save.
    """

    regime: str
    planner: str
    pairs: int
    static_us: float
    room: float
    gap: float | None
    low: float | None
    high: float | None
    saved_percent: float
    charged_gap: float | None
    charged_saved_percent: float


def balanced_seconds(load_E: np.ndarray, costs: MeasuredCosts) -> float:
    """Seconds of a layer with equal work and bytes on every GPU."""
    grid, gpus = costs.grid, costs.cluster.num_gpus
    # the cheapest time of one expert of n tokens, alone or among others
    cheapest_N = (grid.seconds_AN / grid.active_A[:, None]).min(0)
    loads = load_E[load_E > 0]
    inside = np.interp(loads, grid.tokens_N, cheapest_N)
    beyond = cheapest_N[-1] * loads / grid.tokens_N[-1]
    work = float(np.where(loads > grid.tokens_N[-1], beyond, inside).sum())
    tokens = load_E.sum() / gpus
    moved = costs.profile.parts["permute"].at(tokens) + costs.profile.parts["combine"].at(tokens)
    bytes_SG = np.full((gpus, gpus), tokens / gpus * costs.spec.token_bytes)
    return max(work / gpus, float(cheapest_N[0])) + moved + costs.all_to_all_seconds(bytes_SG)


def gap_table(
    routing: Routing,
    costs: MeasuredCosts,
    pairs: int,
    left: Callable[[], float],
    regimes: tuple[Regime, ...] = REGIMES,
) -> list[GapCell]:
    """Every planner in every regime, one slot of extras a GPU, placement from history."""
    spec, share_LE = routing.spec, history_share_LE(routing)
    cells: list[GapCell] = []
    for regime in regimes:
        if left() < 10:
            break
        loads = [
            (layer, loads_by_source(routing, rows, layer, RANKS))
            for rows in sample_iterations(routing, regime, pairs)
            for layer in range(spec.L)
        ]
        bound_B = np.array([balanced_seconds(load_SE.sum(0), costs) for _, load_SE in loads])
        static_B = np.zeros(0)
        for name in PLANNERS_SHOWN:
            planner, plans = PLANNERS.get(name), dict[int, LayerPlan]()
            setting = setting_of(planner, costs)
            time_B, control_B = np.zeros(len(loads)), np.zeros(len(loads))
            for i, (layer, load_SE) in enumerate(loads):
                if layer not in plans:
                    plans[layer] = plan_for(planner, setting, regime, layer, share_LE[layer])
                plan = plans[layer]
                time_B[i] = costs.layer_seconds(quotas(planner, setting, load_SE, plan), plan).total
                control_B[i] = costs.control_seconds(planner.control, layer) if plan.decides else 0.0
            if name == "static":
                static_B = time_B
            cells.append(_cell(regime, name, static_B, time_B, control_B, bound_B))
    return cells


def _cell(
    regime: Regime, name: str, static_B: FloatArray, time_B: FloatArray, control_B: FloatArray, bound_B: FloatArray
) -> GapCell:
    total = float(static_B.sum())
    room = 1.0 - float(bound_B.sum()) / total
    middle = low = high = charged = None
    if room >= LEAST_ROOM:
        middle, low, high = gap_closed(static_B, time_B, bound_B)
        charged, _, _ = gap_closed(static_B, time_B + control_B, bound_B)
    return GapCell(
        regime=regime.name,
        planner=name,
        pairs=len(static_B),
        static_us=1e6 * float(static_B.mean()),
        room=room,
        gap=middle,
        low=low,
        high=high,
        saved_percent=100 * (1.0 - float(time_B.sum()) / total),
        charged_gap=charged,
        charged_saved_percent=100 * (1.0 - float((time_B + control_B).sum()) / total),
    )


def lines(cells: list[GapCell]) -> list[str]:
    """The table."""
    found = ["regime | planner | static µs | room | gap closed, control zero [90 %] | time saved | charged | saved"]
    for c in cells:
        gap = "–" if c.gap is None else f"{c.gap:+.2f} [{c.low:+.2f}, {c.high:+.2f}]"
        charged = "–" if c.charged_gap is None else f"{c.charged_gap:+.2f}"
        found.append(
            f"{c.regime} | {c.planner} | {c.static_us:.1f} | {c.room:.2f} | {gap} | {c.saved_percent:+.1f} % | "
            f"{charged} | {c.charged_saved_percent:+.1f} %"
        )
    return found
