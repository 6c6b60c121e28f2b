"""Speed of planning and dispatch; how far the plans are from the best ones is in ``bench_distance.py``.

    python benchmarks/bench_placement.py

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
from moeless.placement.dispatch import EVEN
from moeless.placement.elastic import ElasticParams
from moeless.placement.eplb import rebalance_experts
from moeless.placement.setting import Setting
from moeless.spec import preset


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
    # what a predictor hands over; made once, like EPLB's loads
    inputs = [
        PlanInput(layer, Phase.PREFILL, Forecast(load_E, load_E, 4096, "synthetic"))
        for layer, load_E in enumerate(load_LE)
    ]
    for scenarios in (0, 2, 8):
        setting = Setting(spec, costs.cluster, costs, budget, ElasticParams(scenarios=scenarios))

        def whole(setting: Setting = setting) -> None:
            elastic.plan_all(inputs, setting)

        print(f"elastic, the same model, {scenarios} scenarios: "
              f"{best_seconds(whole) * 1e3:.1f} ms (target 10)")  # fmt: skip
    spec, costs = protocol_spec(), protocol_costs(8)
    for tokens in (128, 8192, 65_536):
        load_SE = rng.multinomial(tokens, np.tile(rng.dirichlet(np.full(32, 2.0)), 8) / 8).reshape(8, 32)
        load_E = load_SE.sum(0).astype(float)
        budget = Budget.even(32, 8, 2, spec.expert_bytes)
        setting = Setting(spec, costs.cluster, costs, budget, ElasticParams(scenarios=0, skip=False))
        plan = elastic.plan(PlanInput(0, Phase.PREFILL, Forecast(load_E, load_E, tokens, "synthetic")), setting)
        usable = np.ones(plan.R, np.bool_)
        mine = best_seconds(lambda: elastic.dispatch(load_SE, plan, usable, setting), 200)  # noqa: B023
        even = best_seconds(lambda: EVEN(load_SE, plan, usable, setting), 200)  # noqa: B023
        print(f"dispatch, 32 experts, {plan.R} replicas, 8 GPUs, {tokens} assignments: elastic {mine * 1e6:.1f} us "
              f"(target 20), even {even * 1e6:.1f} us")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print("command:", " ".join(sys.argv))
    print(f"moeless {moeless.__version__}, numpy {np.__version__}, Python {platform.python_version()}, "
          f"{platform.processor() or platform.machine()}")  # fmt: skip
    speeds()


if __name__ == "__main__":
    main()
