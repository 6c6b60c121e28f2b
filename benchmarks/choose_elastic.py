"""Defaults of the elastic planners, chosen on training requests alone: the protocol's test requests are never seen.

    python benchmarks/choose_elastic.py [--pairs N] [--settings N] [--folds N] [--processes N] [--out FILE]

The training requests are cut into folds. In each, history is the mean load of the other folds' requests and iterations
are drawn from its own. Settings are drawn at random, all parameters at once, from the values below; the first is the
one in force. A setting's score in a fold is the mean gap closed over regimes, GPUs and ways of charging control time;
where the bound leaves less than a tenth of static EP's time to save, that tenth stands for it, as in the protocol.

What is chosen, by the one-standard-error rule, of the settings that are in no cell below static EP by more than
rounding (of all where there are none): of those that are no more behind the best one than one standard error of the
difference over the folds the one that holds the fewest extras, then the one with the fewest scenarios. ``fuel`` and
``elastic``'s ``scenarios`` are not among the parameters: the time that a dispatch and a plan may take decides them.

``elastic`` first, with control time zero (on few and on many GPUs) and charged; then what ``elastic-ahead`` has beside
it, charged (elsewhere the two are the same), with what was chosen for ``elastic``. The program names both planners'
defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from bench_gap_closed import head_of
from gap_cells import LONG_HORIZON, plan_iteration
from gap_forecasts import forecasts
from gap_protocol import (
    REGIMES,
    SEED,
    Regime,
    Routing,
    bound_seconds,
    history_share_LE,
    load_routing,
    pair_seconds,
    protocol_costs,
    sample_iterations,
)

from moeless.contracts import Budget, IntArray
from moeless.placement import PLANNERS
from moeless.placement.setting import Setting
from moeless.placement.static import static_plan
from moeless.placement.whole_model import spread_over_sources

#: Values that settings are drawn from, besides the default in force.
VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "elastic": {
        "doubt": (0.3, 0.5),
        "decode_doubt": (0.15, 0.25),
        "economy": (5e-4, 1e-3),
        "skip_margin": (0.0, 0.1, 0.25),
    },
    "elastic-ahead": {
        "share_scenarios": (16, 32),
        "spread": (0.25, 0.4),
        "decode_spread": (0.1, 0.2),
        "caution": (0.1, 0.2, 0.4),
        "margin": (0.0025, 0.005, 0.01),
    },
}
#: GPUs and ways of charging control time that settings are judged on.
ASKED: dict[str, tuple[tuple[int, bool], ...]] = {
    "elastic": ((8, False), (8, True), (32, False), (2, True)),
    "elastic-ahead": ((8, True), (32, True), (2, True)),
}
#: Part of static EP's time that stands for the bound's room where that is less.
SMALL_ROOM = 0.1
#: Part of the room that a cell may be below static EP's time by rounding alone.
ROUNDING = 1e-6

_folds: list[Routing]


@dataclasses.dataclass(frozen=True)
class Job:
    """One planner's cells of one setting in one fold."""

    planner: str
    params: tuple[tuple[str, Any], ...]
    fold: int
    pairs: int


def folds_of(routing: Routing, count: int) -> list[Routing]:
    """The training requests as ``count`` routings: each tests on a part that the others train on."""
    order = np.random.default_rng(SEED).permutation(routing.train)
    parts = [np.sort(part) for part in np.array_split(order, count)]
    return [
        dataclasses.replace(routing, test=part, train=np.sort(np.concatenate(parts[:i] + parts[i + 1 :])))
        for i, part in enumerate(parts)
    ]


def settings(planner: str, count: int) -> list[dict[str, Any]]:
    """The defaults in force, and settings drawn from :data:`VALUES`, without repetition."""
    rng, values = np.random.default_rng(SEED), VALUES[planner]
    params = PLANNERS.get(planner).params()
    made = [{name: getattr(params, name) for name in values}]
    while len(made) < count:
        drawn = {name: given[int(rng.integers(len(given)))] for name, given in values.items()}
        if drawn not in made:
            made.append(drawn)
    return made


def judge(job: Job) -> tuple[list[float], float]:
    """Scores of the cells of a job, regime by regime and question by question, and the mean extras."""
    cells, extras = [], []
    for regime in REGIMES:
        for gpus, charged in ASKED[job.planner]:
            score, held = cell(_folds[job.fold], regime, gpus, charged, job)
            cells.append(score)
            extras.append(held / gpus)
    return cells, float(np.mean(extras))


@cache
def drawn(routing: Routing, regime: Regime, pairs: int) -> IntArray:
    """Loads of a fold's iterations, ``[I, L, E]``."""
    return np.stack([routing.loads(rows) for rows in sample_iterations(routing, regime, pairs)])


def cell(routing: Routing, regime: Regime, gpus: int, charged: bool, job: Job) -> tuple[float, float]:
    """Gap closed of one cell (see the module), and its extras per layer; plans are made once, from history."""
    spec, planner = routing.spec, PLANNERS.get(job.planner)
    costs, params = protocol_costs(gpus, spec, charged), planner.params(**dict(job.params))
    load_ILE = drawn(routing, regime, job.pairs)
    load_BE, plain = load_ILE.reshape(-1, spec.E), static_plan(0, spec.E, gpus)
    static = pair_seconds(load_BE[:, plain.expert_R], plain.gpu_R, costs).sum()
    room = max(static - bound_seconds(load_BE, costs).sum(), SMALL_ROOM * static)
    told = forecasts("history", regime.tokens, history_share_LE(routing), load_ILE[0], 0)
    budget = Budget.even(spec.E, gpus, 1, spec.expert_bytes)
    plans = plan_iteration(job.planner, told, regime, budget, costs, LONG_HORIZON, params)
    setting = Setting(spec, costs.cluster, costs, budget, params)
    control, total = costs.control_seconds(planner.control, 0), 0.0
    for load_LE in load_ILE:
        for plan, load_E in zip(plans, load_LE, strict=True):
            quota_SR = planner.dispatch(spread_over_sources(load_E, gpus), plan, np.ones(plan.R, np.bool_), setting)
            total += pair_seconds(quota_SR.sum(0), plan.gpu_R, costs)[0] + (control if plan.decides else 0.0)
    return float((static - total) / room), float(np.mean([plan.num_extra for plan in plans]))


def choose(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The line that the rule in the module's docstring picks."""
    allowed = [line for line in lines if line["worst"] >= -ROUNDING] or lines
    best = max(allowed, key=lambda line: line["mean"])
    for line in lines:
        behind_F = np.array(best["fold_means"]) - np.array(line["fold_means"])
        line["behind"] = float(behind_F.mean())
        line["error"] = float(behind_F.std(ddof=1) / np.sqrt(len(behind_F)))
    alike = [line for line in allowed if line["behind"] <= line["error"] + 1e-12]
    return min(alike, key=lambda line: (round(line["extras"], 3), line["params"].get("share_scenarios", 0)))


def study(planner: str, given: dict[str, Any], options: argparse.Namespace, pool: Any) -> dict[str, Any]:
    """Judge a planner's settings in all folds, say what was found, and choose."""
    tried = settings(planner, options.settings)
    jobs = [Job(planner, tuple((given | s).items()), f, options.pairs) for s in tried for f in range(options.folds)]
    done = pool.imap(judge, jobs)
    asked = [f"{r.name}, {gpus} GPUs, {'charged' if c else 'zero'}" for r in REGIMES for gpus, c in ASKED[planner]]
    lines = []
    for params in tried:
        found = [next(done) for _ in range(options.folds)]
        cells_FC = np.array([cells for cells, _ in found])
        line = {
            "params": params,
            "mean": float(cells_FC.mean()),
            "fold_means": cells_FC.mean(1).tolist(),
            "cells": cells_FC.mean(0).tolist(),
            "worst": float(cells_FC.mean(0).min()),
            "extras": float(np.mean([extras for _, extras in found])),
        }
        lines.append(line)
        worst = f"worst {line['worst']:.3f} in {asked[int(cells_FC.mean(0).argmin())]}"
        print(f"{planner} {line['mean']:.4f} {line['extras']:.2f}x {params}; {worst}", flush=True)
    chosen = choose(lines)
    print(f"{planner}: {chosen['params']}, {chosen['behind']:.4f} ± {chosen['error']:.4f} behind the best", flush=True)
    return {"planner": planner, "chosen": chosen["params"], "cells": asked, "lines": lines}


def main() -> None:
    global _folds
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=48, help="(iteration, layer) pairs of a cell and fold")
    parser.add_argument("--settings", type=int, default=10, help="settings of each planner")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    command = " ".join(["python benchmarks/choose_elastic.py", *sys.argv[1:]])
    print("command:", command, flush=True)
    started = time.perf_counter()
    _folds = folds_of(load_routing(), options.folds)
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        first = study("elastic", {}, options, pool)
        studies = [first, study("elastic-ahead", first["chosen"], options, pool)]
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} s")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        head = head_of(command, seconds, None, synthetic=False)
        head |= {"chosen": {found["planner"]: found["chosen"] for found in studies}}
        options.out.write_text(json.dumps(head | {"studies": studies}, indent=1) + "\n")


if __name__ == "__main__":
    main()
