"""Gap closed by every planner on real routing, by the protocol in ``gap_protocol.py``.

    python benchmarks/bench_gap_closed.py [--pairs N] [--exact] [--charged] [--know history|noisy|true] [--gpus G ...]

``--know`` is what placement knows: the training part's mean load, the true load within 30 % log-normal noise, or
the true load. ``--exact`` adds the MILP dispatch on elastic's placement. ``--charged`` adds control time to planners
that decide after the gate, except for layers whose plan has no extras (the skip path). Cells: gap closed with its
bootstrap 90 % interval, copies held beyond the primaries, and time against static EP.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterable

import numpy as np
from gap_protocol import (
    REGIMES,
    Regime,
    Routing,
    bound_seconds,
    gap_closed,
    history_share_LE,
    load_routing,
    pair_seconds,
    protocol_costs,
    sample_pairs,
)

import moeless
from moeless.contracts import Budget, Forecast, LayerPlan, PlanInput, Policy
from moeless.placement import PLANNERS
from moeless.placement.exact import exact_dispatch
from moeless.placement.static import static_plan

NOISE = 0.3


def forecast_of(know: str, regime: Regime, share_E: np.ndarray, load_E: np.ndarray, seed: int) -> Forecast:
    """What placement is told."""
    if know == "history":
        mean = share_E * load_E.sum()
    else:
        noise = np.random.default_rng(seed).normal(0, NOISE, len(load_E)) if know == "noisy" else 0.0
        mean = load_E * np.exp(noise)
        mean *= load_E.sum() / max(mean.sum(), 1e-9)
    spread = 0.0 if know == "true" else (NOISE * mean) ** 2 if know == "noisy" else mean
    return Forecast(mean, spread + np.zeros_like(mean), regime.tokens, know)


def table(
    routing: Routing,
    names: Iterable[str],
    regimes: Iterable[Regime],
    gpus: int,
    extra: int,
    options: argparse.Namespace,
) -> None:
    """Print one row per planner, one column per regime."""
    # planning and dispatch see costs with control where it is charged, so that the skip decision is part of the result
    costs = protocol_costs(gpus, routing.spec, control=options.charged)
    spec, machine, history = routing.spec, costs.cluster, history_share_LE(routing)
    budget = Budget.even(spec.E, gpus, extra, spec.expert_bytes)
    print(f"\n{gpus} GPUs, +{extra} slot(s) a GPU, placement knows: {options.know}, "
          f"control time {'charged' if options.charged else 'zero'}")  # fmt: skip
    rows: dict[str, list[str]] = {name: [] for name in names}
    if options.exact:
        rows["elastic, exact dispatch"] = []
    for regime in regimes:
        layer_B, load_BE = sample_pairs(routing, regime, options.pairs)
        plain = static_plan(0, spec.E, gpus)
        static_B = pair_seconds(load_BE[:, plain.expert_R], plain.gpu_R, costs)
        bound_B = bound_seconds(load_BE, costs)
        room = 1 - bound_B.sum() / static_B.sum()
        head = f"{regime.name}: static {static_B.mean() * 1e6:.0f} µs, bound/static {1 - room:.2f}"
        print(f"  {head}", flush=True)
        for name in names:
            planner = PLANNERS.get(name)
            params = planner.params()
            time_B, extras, exact_B = np.zeros(len(load_BE)), 0, np.zeros(len(load_BE))
            made: dict[int, LayerPlan] = {}
            for i, (layer, load_E) in enumerate(zip(layer_B.tolist(), load_BE, strict=True)):
                if layer not in made or options.know != "history":
                    forecast = forecast_of(options.know, regime, history[layer], load_E, i)
                    made[layer] = planner.plan_layer(
                        PlanInput(layer, regime.phase, forecast, None, None, 10_000),
                        spec=spec, cluster=machine, costs=costs, budget=budget, params=params,
                    )  # fmt: skip
                plan = made[layer]
                extras += plan.num_extra
                # each source rank holds an equal part of the tokens
                load_SE = np.stack([np.full(spec.E, 0)] * gpus)
                source = np.arange(load_E.sum()) % gpus
                np.add.at(load_SE, (source, np.repeat(np.arange(spec.E), load_E)), 1)
                quota_SR = planner.dispatch(
                    load_SE, plan, np.ones(plan.R, np.bool_), spec=spec, cluster=machine, costs=costs, params=params
                )
                time_B[i] = pair_seconds(quota_SR.sum(0), plan.gpu_R, costs)[0]
                if options.charged and plan.num_extra:
                    time_B[i] += costs.control_seconds(Policy(name), layer)
                if options.exact and name == "elastic":
                    exact = exact_dispatch(load_E, plan, np.ones(plan.R, np.bool_), costs.terms(), gpus, time_limit=20)
                    exact_B[i] = exact.seconds
            rows[name].append(cell(static_B, time_B, bound_B, extras / len(load_BE), room))
            if options.exact and name == "elastic":
                rows["elastic, exact dispatch"].append(cell(static_B, exact_B, bound_B, extras / len(load_BE), room))
    width = max(map(len, rows)) + 2
    print(" " * width + "".join(f"{regime.name:>34}" for regime in regimes))
    for name, cells in rows.items():
        print(f"{name:<{width}}" + "".join(f"{text:>34}" for text in cells), flush=True)


def cell(static_B: np.ndarray, time_B: np.ndarray, bound_B: np.ndarray, extras: float, room: float) -> str:
    """Gap closed with its interval; below 10 % of room also the time saved in per cent."""
    middle, low, high = gap_closed(static_B, time_B, bound_B)
    saved = 100 * (1 - time_B.sum() / static_B.sum())
    text = f"{middle:.2f} [{low:.2f}, {high:.2f}] {extras:.1f}x"
    return text + (f" {saved:+.2f}%" if room < 0.1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=216)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--charged", action="store_true")
    parser.add_argument("--know", choices=("history", "noisy", "true"), default="history")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8])
    parser.add_argument("--extra", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--planners", nargs="+", default=[n for n in PLANNERS.names() if n not in ("static", "milp")])
    options = parser.parse_args()
    print("command:", " ".join(sys.argv))
    print(f"moeless {moeless.__version__}, numpy {np.__version__}, Python {platform.python_version()}")
    routing = load_routing()
    for gpus in options.gpus:
        for extra in options.extra:
            table(routing, options.planners, REGIMES, gpus, extra, options)


if __name__ == "__main__":
    main()
