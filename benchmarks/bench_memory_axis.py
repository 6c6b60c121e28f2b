"""Gap closed against extra copies held in memory: history against forecast, on consecutive iterations of real routing.

    python benchmarks/bench_memory_axis.py [--iterations N] [--caps 1 2 4 ...] [--out FILE.json] [--figure FILE.svg]

Placement by ``elastic`` under a cap on a layer's extra copies; dispatch from the true counts in every case; protocol
costs, control time zero; eight GPUs. Memory is the extra copies' bytes over time, from the moment their transfer
begins until they are dropped, over all GPUs and layers, divided by the time the iterations take (with attention and
the rest, by roofline). The curves:

- ``history``: copies chosen once from the training part's mean load, always in memory;
- ``forecast, ideal``: chosen anew for every iteration from the fitted forecast of the layer before, there at once;
- ``true, ideal``: the same with the true loads: what the best forecast could do;
- ``forecast, kept (host | peer)``: chosen by forecast, loaded from host memory or from another GPU over the fast link
  when first wanted, kept while planned; planned with what is known of the transfers and of the forecasts' life;
- ``forecast, one layer (host | peer)``: loaded when the layer before begins, over the host link or from another GPU
  over the fast link, and dropped after its layer;
- ``history, one layer (peer)``: history's copies, loaded and dropped in the same way in every iteration.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_gap_closed import head_of
from gap_cells import LONG_HORIZON, plan_iteration
from gap_forecasts import fitted_predictor, forecasts, predicted_forecasts
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
)
from memory_replay import Life, Replayed, consecutive_rows, outside_seconds, replay

from moeless.contracts import Budget, Forecast, LayerPlan, PlanInput
from moeless.placement import PLANNERS
from moeless.placement.setting import Setting
from moeless.placement.static import static_plan
from moeless.predictors.forecast_horizon import ForecastHorizon

GPUS = 8
HISTORY = "history"
#: Curve, how its copies live, where they come from, what chooses them.
CURVES: tuple[tuple[str, Life, str, str], ...] = (
    (HISTORY, "fixed", "local", "history"),
    ("forecast, ideal", "ideal", "local", "predicted"),
    ("true, ideal", "ideal", "local", "true"),
    ("forecast, kept (host)", "resident", "host", "predicted"),
    ("forecast, kept (peer)", "resident", "peer", "predicted"),
    ("forecast, one layer (host)", "transient", "host", "predicted"),
    ("forecast, one layer (peer)", "transient", "peer", "predicted"),
    ("history, one layer (peer)", "transient", "peer", HISTORY),
)


@dataclass(frozen=True)
class Point:
    """One point of a curve; memory in GB over all GPUs and layers."""

    regime: str
    curve: str
    cap: int
    gap: float
    low: float
    high: float
    held_gb: float
    loaded_gb_per_s: float
    late: float


_routing: Routing
_given: dict[str, tuple[np.ndarray, list[list[Forecast]]]] = {}


def _points(job: tuple[Regime, int, int]) -> list[Point]:
    regime, cap, extra = job
    spec, costs = _routing.spec, protocol_costs(GPUS, _routing.spec)
    load_ILE, predicted = _given[regime.name]
    share_LE, planner = history_share_LE(_routing), PLANNERS.get("elastic")
    even = Budget.even(spec.E, GPUS, extra, spec.expert_bytes)
    budget = Budget(even.slots_G, even.bytes_G, cap)
    setting = Setting(spec, costs.cluster, costs, budget, planner.params())
    told = {
        "predicted": predicted,
        "true": [forecasts("true", regime.tokens, share_LE, load_LE, i) for i, load_LE in enumerate(load_ILE)],
    }
    first = forecasts(HISTORY, regime.tokens, share_LE, load_ILE[0], 0)
    deployed = plan_iteration("elastic", first, regime, budget, costs, LONG_HORIZON)
    from_nothing: dict[tuple[str, int], list[LayerPlan]] = {}

    def plan_for(know: str, life: Life, seconds: float) -> Any:
        lasting = ForecastHorizon(share_LE)

        def plan(i: int, layer: int, previous: LayerPlan | None, state_R: Any, lead: float) -> LayerPlan:
            if life == "resident":
                forecast = told[know][i][layer]
                horizon = lasting.horizon(layer, regime.phase, forecast, share_LE[layer])
                x = PlanInput(layer, regime.phase, forecast, previous, state_R, horizon, lead, seconds)
                return planner.plan(x, setting)
            if know == HISTORY:
                return deployed[layer]
            if (know, i) not in from_nothing:
                from_nothing[know, i] = plan_iteration("elastic", told[know][i], regime, budget, costs)
            return from_nothing[know, i][layer]

        return plan

    outside = outside_seconds(costs, regime)
    made = []
    for curve, life, tier, know in CURVES:
        seconds = costs.load_seconds(spec.expert_bytes, tier, 0)
        done = replay(load_ILE, planner, setting, plan_for(know, life, seconds), life, seconds, outside, deployed)
        made.append(_point(regime, curve, cap, load_ILE, done, costs))
    return made


def _point(regime: Regime, curve: str, cap: int, load_ILE: np.ndarray, done: Replayed, costs: Any) -> Point:
    plain, load_BE = static_plan(0, costs.spec.E, GPUS), load_ILE.reshape(-1, costs.spec.E)
    static_B = pair_seconds(load_BE[:, plain.expert_R], plain.gpu_R, costs)
    middle, low, high = gap_closed(static_B, done.time_IL.reshape(-1), bound_seconds(load_BE, costs))
    return Point(
        regime.name, curve, cap, middle, low, high, done.held_bytes / 1e9, done.loaded_bytes_per_second / 1e9, done.late
    )


def needed_gb(points: list[Point], gap: float) -> float | None:
    """Least memory at which a curve reaches ``gap``, between its points by straight lines; None where it never does."""
    at = sorted(((0.0, 0.0), *((p.held_gb, p.gap) for p in points)))
    best, before = None, at[0]
    for point in at[1:]:
        if point[1] >= gap:
            slope = (gap - before[1]) / max(point[1] - before[1], 1e-12)
            found = before[0] + max(slope, 0.0) * (point[0] - before[0])
            best = found if best is None else min(best, found)
            break
        before = point if point[1] > before[1] else before
    return best


def savings(points: list[Point]) -> list[dict[str, Any]]:
    """Memory that each curve needs for the gap that history closes at each of its caps."""
    rows = []
    for regime in dict.fromkeys(p.regime for p in points):
        mine = [p for p in points if p.regime == regime]
        for base in (p for p in mine if p.curve == HISTORY):
            row: dict[str, Any] = {"regime": regime, "cap": base.cap, "gap": base.gap, HISTORY: base.held_gb}
            for curve, *_ in CURVES[1:]:
                row[curve] = needed_gb([p for p in mine if p.curve == curve], base.gap)
            rows.append(row)
    return rows


def draw(points: list[Point], out: Path) -> None:
    """One panel per regime."""
    from moeless.report import style

    names = [curve for curve, *_ in CURVES]
    look = style.series(names)
    regimes = list(dict.fromkeys(p.regime for p in points))
    with style.drawing() as plt:
        figure, axes = plt.subplots(
            1, len(regimes), figsize=(style.WIDE, 2.9), layout="constrained", sharey=True, squeeze=False
        )
        for ax, regime in zip(axes[0], regimes, strict=True):
            for name in names:
                mine = sorted((p for p in points if (p.regime, p.curve) == (regime, name)), key=lambda p: p.cap)
                held, gap = [p.held_gb for p in mine], [p.gap for p in mine]
                label = name if ax is axes[0][0] else None
                ax.plot(
                    held, gap, label=label, color=look[name].colour, linestyle=look[name].line, marker=look[name].marker
                )
            ax.set(title=regime, xlabel="extra copies held (GB)")
            ax.set_xscale("log")
        axes[0][0].set_ylabel("gap closed")
        figure.legend(loc="outside lower center", ncols=3)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
        plt.close(figure)


def show(points: list[Point]) -> None:
    for regime in dict.fromkeys(p.regime for p in points):
        print(f"\n{regime}: gap closed [90 % interval] @ GB held, GB/s loaded, part of copies late")
        for curve, *_ in CURVES:
            mine = [p for p in points if (p.regime, p.curve) == (regime, curve)]
            cells = (
                f"{p.gap:.2f} [{p.low:.2f}, {p.high:.2f}] @{p.held_gb:6.2f} {p.loaded_gb_per_s:6.1f} {p.late:4.0%}"
                for p in mine
            )
            print(f"{curve:<28}" + " | ".join(cells))
    print("\nGB for the gap that history closes (- : never reached)")
    for row in savings(points):
        cells = " ".join(f"{'-' if row[c] is None else format(row[c], '.2f'):>8}" for c, *_ in CURVES)
        print(f"{row['regime']:<16} cap {row['cap']:>2} gap {row['gap']:.2f}: {cells}")


def main() -> None:
    global _routing
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--caps", type=int, nargs="+", default=[1, 2, 4, 8, 12, 16])
    parser.add_argument("--extra", type=int, default=2, help="slots a GPU beyond the primaries")
    parser.add_argument(
        "--regimes", nargs="+", default=["prefill 16384", "prefill 4096", "decode 2048"], metavar="'decode 32'"
    )
    parser.add_argument("--predictor", type=Path, help="fitted predictor; default: one fitted here, once")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file, with a CSV beside it")
    parser.add_argument("--figure", type=Path, help="SVG file")
    options = parser.parse_args()
    command = "python benchmarks/bench_memory_axis.py " + " ".join(sys.argv[1:])
    print("command:", command, flush=True)
    started = time.perf_counter()
    _routing = load_routing()
    predictor, _ = fitted_predictor(options.predictor)
    regimes = [regime for regime in REGIMES if regime.name in options.regimes]
    share_LE = history_share_LE(_routing)
    for regime in regimes:
        rows_I = consecutive_rows(_routing, regime, options.iterations)
        load_ILE = np.stack([_routing.loads(rows) for rows in rows_I])
        _given[regime.name] = load_ILE, predicted_forecasts(_routing, rows_I, regime, predictor, share_LE)
    jobs = [(regime, cap, options.extra) for regime in regimes for cap in options.caps]
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        points = [point for made in pool.imap(_points, jobs) for point in made]
    show(points)
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} s")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(point) for point in points]
        head = head_of(command, seconds, predictor.name, synthetic=False)
        options.out.write_text(json.dumps(head | {"savings": savings(points), "points": rows}, indent=1) + "\n")
        with options.out.with_suffix(".csv").open("w", newline="") as handle:
            writer = csv.DictWriter(handle, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if options.figure:
        draw(points, options.figure)


if __name__ == "__main__":
    main()
