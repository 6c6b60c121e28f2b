"""How far the planners are from the best plan there is, on random small instances with known loads.

    python benchmarks/bench_distance.py [--instances N] [--out FILE.json]

Six experts on three GPUs with one extra slot each; loads are synthetic (Dirichlet, 10 to 30,000 tokens), costs the
protocol's. Time above the proven lower bound of ``milp``, in per cent: median, 90th percentile and worst. The last row
is how far below the best plan the closed-form ``bound`` lies.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
from bench_gap_closed import head_of
from gap_protocol import protocol_costs

from moeless.contracts import Budget, Forecast, Phase, PlanInput
from moeless.placement import PLANNERS
from moeless.placement.bound import layer_bound
from moeless.placement.exact import terms_seconds
from moeless.placement.milp import MilpParams, best_plan
from moeless.placement.setting import Setting
from moeless.spec import Attention, MoESpec

EXPERTS, GPUS = 6, 3
SPEC = MoESpec("six", 2880, 1, (0,), EXPERTS, 1, 2880, Attention(8, 8, 64), 1000)
NAMES = [name for name in PLANNERS.names() if name != "milp"]
BOUND = "bound (below the best plan)"


def excess(seed: int) -> dict[str, float]:
    """Per cent above the exact plan's lower bound, by planner."""
    costs = protocol_costs(GPUS, SPEC)
    budget = Budget.even(EXPERTS, GPUS, 1, SPEC.expert_bytes)
    rng = np.random.default_rng(seed)
    load_E = rng.multinomial(int(10 ** rng.uniform(1, 4.5)), rng.dirichlet(np.full(EXPERTS, 0.7)))
    exact = best_plan(load_E, 0, Setting(SPEC, costs.cluster, costs, budget, MilpParams()))
    load_SE = np.zeros((GPUS, EXPERTS), np.int64)
    load_SE[0] = load_E
    forecast = Forecast(load_E.astype(float), np.zeros(EXPERTS), int(load_E.sum()), "true")
    found = {}
    for name in NAMES:
        planner = PLANNERS.get(name)
        setting = Setting(SPEC, costs.cluster, costs, budget, planner.params())
        plan = planner.plan(PlanInput(0, Phase.PREFILL, forecast), setting)
        quota_SR = planner.dispatch(load_SE, plan, np.ones(plan.R, np.bool_), setting)
        seconds = terms_seconds(quota_SR.sum(0), plan.gpu_R, costs.terms(), GPUS)
        found[name] = 100 * (seconds / exact.lower_bound - 1)
    found[BOUND] = 100 * (1 - layer_bound(load_E, costs.terms(), GPUS, budget.max_extra) / exact.seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    command = "python benchmarks/bench_distance.py " + " ".join(sys.argv[1:])
    print("command:", command, flush=True)
    started = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        made = pool.map(excess, range(options.instances), chunksize=4)
    rows = []
    print(f"{'per cent':<28}{'median':>10}{'90th':>10}{'worst':>10}")
    for name in (*NAMES, BOUND):
        values = np.array([found[name] for found in made])
        median, high, worst = (float(x) for x in (np.median(values), np.quantile(values, 0.9), values.max()))
        rows.append({"planner": name, "median": median, "p90": high, "worst": worst})
        print(f"{name:<28}{median:>10.2f}{high:>10.2f}{worst:>10.2f}")
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} s")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        head = head_of(command, seconds, None, synthetic=True)
        options.out.write_text(json.dumps(head | {"instances": options.instances, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
