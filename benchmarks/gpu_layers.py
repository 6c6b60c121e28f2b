"""Emulated expert-parallel layers of ``bench_gpu.py``: real routing, each rank's work in turn, beside the prediction.

Axes: S source ranks, R replicas, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gap_protocol import REGIMES, Regime, Routing, history_share_LE, sample_rows

from moeless.contracts import Budget, Forecast, LayerPlan, PlanInput
from moeless.costs.measured import MeasuredCosts
from moeless.placement import PLANNERS, Planner
from moeless.placement.setting import Setting
from moeless.profiling.emulate import REFERENCE, EmulatedLayer, RankWork, emulate_layer
from moeless.profiling.timing import Effort
from moeless.spec import MoESpec, preset

POLICIES = ("static", "eplb", "moeless", "elastic")
RANKS = 8
SEED = 0


@dataclass(frozen=True)
class Cell:
    """One (regime, policy) of the emulated layers: means over its pairs.

    Attributes:
        expert_error_mean: predicted over measured time of the slowest rank, minus 1; ``_abs`` its absolute value.
        speed: time of the reference work, measured beside the ranks, over the profile's: above 1 the machine was
            slower than when the profile was made.
        model_error_mean: as ``expert_error_mean`` with the prediction at that speed: what is left is the model's.
        rank_error_abs: the model's error on all ranks, not on the slowest alone.
        total_error_mean: the layer's, exchange (predicted on both sides) in it.
    """

    regime: str
    policy: str
    pairs: int
    measured_ms: float
    predicted_ms: float
    expert_measured_ms: float
    expert_error_mean: float
    expert_error_abs: float
    speed: float
    model_error_mean: float
    model_error_abs: float
    rank_error_abs: float
    total_error_mean: float


def shapes_of(routing: Routing, model: str) -> Routing:
    """The routing's experts at another model's FFN shapes."""
    other = preset(model)
    small = model == "bundled"
    changed = {
        "hidden_size": other.hidden_size,
        "expert_intermediate_size": other.expert_intermediate_size,
        "dtype": "float32" if small else other.dtype,
        "expert_dtype": "float32" if small else "bfloat16",
    }
    spec = MoESpec.from_json(routing.spec.to_json() | changed)
    return Routing(routing.name, routing.topk_TLK, routing.offsets, routing.train, routing.test, spec)


def loads_by_source(routing: Routing, rows: np.ndarray, layer: int, ranks: int) -> np.ndarray:
    """Tokens of each source rank for each expert, ``[S, E]``: ranks own consecutive tokens."""
    rank_T = np.arange(len(rows)) * ranks // len(rows)
    chosen_TK = routing.topk_TLK[rows, layer].astype(np.int64)
    flat = rank_T[:, None] * routing.spec.E + chosen_TK
    return np.bincount(flat.reshape(-1), minlength=ranks * routing.spec.E).reshape(ranks, routing.spec.E)


def setting_of(planner: Planner, costs: MeasuredCosts) -> Setting:
    """A planner at its defaults, one slot of extras per GPU."""
    spec = costs.spec
    return Setting(spec, costs.cluster, costs, Budget.even(spec.E, RANKS, 1, spec.expert_bytes), planner.params())


def plan_for(planner: Planner, setting: Setting, regime: Regime, layer: int, share_E: np.ndarray) -> LayerPlan:
    """A plan made ahead from the history's mean load."""
    mean_E = share_E * regime.tokens * setting.spec.K
    forecast = Forecast(mean_E, mean_E, regime.tokens, "history")
    return planner.plan(PlanInput(layer, regime.phase, forecast), setting)


def quotas(planner: Planner, setting: Setting, load_SE: np.ndarray, plan: LayerPlan) -> np.ndarray:
    """The planner's dispatch with every copy ready, ``[S, R]``."""
    return planner.dispatch(load_SE, plan, np.ones(plan.R, np.bool_), setting)


def emulate(
    routing: Routing,
    costs: MeasuredCosts,
    work: RankWork,
    effort: Effort,
    pairs: int,
    left: Callable[[], float],
    regimes: tuple[Regime, ...] = REGIMES,
) -> list[Cell]:
    """All policies on the same real loads, one slot of extras per GPU, plans from history."""
    spec, share_LE = routing.spec, history_share_LE(routing)
    active, tokens = min(REFERENCE[0], work.weights.count), REFERENCE[1]
    reference = float(costs.grouped_seconds(np.full(active, tokens), np.zeros(active, np.int64))[0])
    cells: list[Cell] = []
    for regime in regimes:
        if left() < 15:
            break
        random = np.random.default_rng([SEED, int(regime.phase), regime.tokens])
        layers = random.choice(spec.L, pairs, replace=pairs > spec.L).tolist()
        drawn = [
            (layer, loads_by_source(routing, sample_rows(routing, regime, random, routing.test), layer, RANKS))
            for layer in layers
        ]
        for name in POLICIES:
            planner = PLANNERS.get(name)
            setting, found = setting_of(planner, costs), []
            for layer, load_SE in drawn:
                plan = plan_for(planner, setting, regime, layer, share_LE[layer])
                found.append(emulate_layer(quotas(planner, setting, load_SE, plan), plan, costs, work, effort))
            cells.append(summarise(regime, name, found, reference))
    return cells


def summarise(regime: Regime, policy: str, layers: list[EmulatedLayer], reference: float) -> Cell:
    """Means over the pairs."""
    error = np.array([row.expert_error for row in layers])
    speed = np.array([row.reference / reference for row in layers])
    model = (1.0 + error) * speed - 1.0
    ranks = np.concatenate([(1.0 + row.rank_errors) * s - 1.0 for row, s in zip(layers, speed, strict=True)])
    return Cell(
        regime=regime.name,
        policy=policy,
        pairs=len(layers),
        measured_ms=1e3 * float(np.mean([row.total for row in layers])),
        predicted_ms=1e3 * float(np.mean([row.predicted.total for row in layers])),
        expert_measured_ms=1e3 * float(np.mean([row.expert for row in layers])),
        expert_error_mean=float(error.mean()),
        expert_error_abs=float(np.abs(error).mean()),
        speed=float(speed.mean()),
        model_error_mean=float(model.mean()),
        model_error_abs=float(np.abs(model).mean()),
        rank_error_abs=float(np.abs(ranks).mean()),
        total_error_mean=float(np.mean([row.total_error for row in layers])),
    )


def lines(cells: list[Cell]) -> list[str]:
    """The table and the simulator's error over it."""
    found = [
        "regime | policy | measured ms | predicted ms | error on the slowest rank | machine's speed | at that speed | "
        "all ranks, absolute | on the layer"
    ]
    found += [
        f"{c.regime} | {c.policy} | {c.measured_ms:.3f} | {c.predicted_ms:.3f} | {c.expert_error_mean:+.1%} | "
        f"{c.speed:.2f} | {c.model_error_mean:+.1%} | {c.rank_error_abs:.1%} | {c.total_error_mean:+.1%}"
        for c in cells
    ]
    if cells:
        raw, model = [abs(c.expert_error_mean) for c in cells], [abs(c.model_error_mean) for c in cells]
        found.append(
            f"simulator's error on the slowest rank: {np.mean(raw):.1%} mean of cells, {max(raw):.1%} worst; at the "
            f"machine's speed {np.mean(model):.1%}, {max(model):.1%}"
        )
    return found
