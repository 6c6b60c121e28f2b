"""Speed of planning and dispatch, and the heuristics' distance from the exact plan.

    python benchmarks/bench_placement.py [--instances N]

Times are the best of several runs on one core, compilation left out. Loads are synthetic (Dirichlet).
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable

import numpy as np
from gap_protocol import protocol_costs, protocol_spec

import moeless
from moeless.contracts import Budget, Forecast, Phase, PlanInput
from moeless.placement import PLANNERS
from moeless.placement.dispatch import even_dispatch
from moeless.placement.elastic import ElasticParams
from moeless.placement.eplb import rebalance_experts
from moeless.placement.exact import terms_seconds
from moeless.placement.milp import MilpParams, best_plan
from moeless.spec import Attention, MoESpec, preset


def best_seconds(call: Callable[[], object], repeats: int = 20) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def speeds() -> None:
    rng = np.random.default_rng(0)
    load_LE = rng.dirichlet(np.full(256, 0.5), 58) * 4096 * 8
    print(f"EPLB, 58 layers x 256 experts -> 288 slots on 32 GPUs: "
          f"{best_seconds(lambda: rebalance_experts(load_LE, 288, 1, 1, 32)) * 1e3:.2f} ms (target 3)")  # fmt: skip
    spec = preset("deepseek-v3")
    costs = protocol_costs(32, spec)
    budget = Budget.even(256, 32, 1, spec.expert_bytes)
    elastic = PLANNERS.get("elastic")
    for scenarios in (0, 2, 8):
        params = ElasticParams(scenarios=scenarios)

        def whole(params: ElasticParams = params) -> None:
            for layer, load_E in enumerate(load_LE):
                elastic.plan_layer(
                    PlanInput(layer, Phase.PREFILL, Forecast(load_E, load_E, 4096, "synthetic")),
                    spec=spec, cluster=costs.cluster, costs=costs, budget=budget, params=params,
                )  # fmt: skip

        print(f"elastic, the same model, {scenarios} scenarios: "
              f"{best_seconds(whole, 3) * 1e3:.1f} ms (target 10)")  # fmt: skip
    spec, costs = protocol_spec(), protocol_costs(8)
    for tokens in (128, 8192, 65_536):
        load_SE = rng.multinomial(tokens, np.tile(rng.dirichlet(np.full(32, 2.0)), 8) / 8).reshape(8, 32)
        load_E = load_SE.sum(0).astype(float)
        plan = elastic.plan_layer(
            PlanInput(0, Phase.PREFILL, Forecast(load_E, load_E, tokens, "synthetic")), spec=spec,
            cluster=costs.cluster, costs=costs, budget=Budget.even(32, 8, 2, spec.expert_bytes),
            params=ElasticParams(scenarios=0, skip=False),
        )  # fmt: skip
        usable = np.ones(plan.R, np.bool_)
        shared = {"spec": spec, "cluster": costs.cluster, "costs": costs, "params": ElasticParams()}
        mine = best_seconds(lambda: elastic.dispatch(load_SE, plan, usable, **shared), 200)  # noqa: B023
        even = best_seconds(lambda: even_dispatch(load_SE, plan, usable, **shared), 200)  # noqa: B023
        print(f"dispatch, 32 experts, {plan.R} replicas, 8 GPUs, {tokens} assignments: elastic {mine * 1e6:.1f} us "
              f"(target 20), even {even * 1e6:.1f} us")  # fmt: skip


def distances(instances: int) -> None:
    """Excess over the exact plan's proven lower bound, loads known, 6 experts on 3 GPUs, one extra slot each."""
    spec = MoESpec("six", 2880, 1, (0,), 6, 1, 2880, Attention(8, 8, 64), 1000)
    costs = protocol_costs(3, spec)
    budget = Budget.even(6, 3, 1, spec.expert_bytes)
    names = [name for name in PLANNERS.names() if name != "milp"]
    excess: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(instances):
        rng = np.random.default_rng(seed)
        load_E = rng.multinomial(int(10 ** rng.uniform(1, 4.5)), rng.dirichlet(np.full(6, 0.7)))
        shared = {"spec": spec, "cluster": costs.cluster, "costs": costs}
        exact = best_plan(load_E, layer=0, budget=budget, params=MilpParams(), **shared)
        for name in names:
            planner = PLANNERS.get(name)
            forecast = Forecast(load_E.astype(float), np.zeros(6), int(load_E.sum()), "true")
            plan = planner.plan_layer(
                PlanInput(0, Phase.PREFILL, forecast), budget=budget, params=planner.params(), **shared
            )
            load_SE = np.zeros((3, 6), np.int64)
            load_SE[0] = load_E
            quota = planner.dispatch(load_SE, plan, np.ones(plan.R, np.bool_), params=planner.params(), **shared)
            seconds = terms_seconds(quota.sum(0), plan.gpu_R, costs.terms(), 3)
            excess[name].append(100 * (seconds / exact.lower_bound - 1))
    print(f"\ntime above the exact plan, {instances} random instances (6 experts, 3 GPUs, +1 slot), per cent")
    print(f"{'planner':<20}{'median':>10}{'worst':>10}")
    for name, values in excess.items():
        print(f"{name:<20}{np.median(values):>10.2f}{np.max(values):>10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=200)
    options = parser.parse_args()
    print("command:", " ".join(sys.argv))
    print(f"moeless {moeless.__version__}, numpy {np.__version__}, Python {platform.python_version()}, "
          f"{platform.processor() or platform.machine()}")  # fmt: skip
    speeds()
    distances(options.instances)


if __name__ == "__main__":
    main()
