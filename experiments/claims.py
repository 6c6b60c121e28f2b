"""The paper's five headline figures beside ours: latency and three bills against each baseline, by two cost models.

Run: python -m moeless.experiments.claims --requests 24 --out results/reference/claims [--quick]
The paper's three models are served with made-up routing (their real routing is out of reach), gpt-oss-20b with its
real routing where ../shared/data or MOELESS_SHARED_DATA has it. One-second batching and eight GPUs as in the paper.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeless.contracts import Policy
from moeless.errors import RunFailed
from moeless.experiments import claims_table
from moeless.experiments.cells import intervals
from moeless.files import write_text
from moeless.metrics import Result, write_result
from moeless.simulator.bench import Bench, BenchConfig
from moeless.spec import preset
from moeless.traces.synthetic import SyntheticParams, write_synthetic
from moeless.tracking.environment import git_state

#: The oracle *predictor* knows the true loads: the best that any forecast can do for MoEless. The paper does not state
#: its memory cap; the last entry has three extra slots per GPU and layer instead of one.
POLICIES = (
    ("static", 1),
    ("eplb:history", 1),
    ("oracle", 1),
    ("moeless:oracle:1", 1),
    ("moeless:history:1", 1),
    ("elastic:history:1", 1),
    ("moeless:oracle:1", 3),
)
#: Llama-4-Scout with one extra copy per GPU and layer does not fit eight 48 GB GPUs beside its replicated weights.
MODELS = {"mixtral-8x7b": "a6000x8", "phi-3.5-moe": "a6000x8", "llama-4-scout": "h100x8", "gpt-oss-20b": "a6000x8"}


def trace_of(model: str, folder: Path, requests: int) -> Path | None:
    """A model's trace; None where gpt-oss-20b's recording is not there."""
    path = folder / model
    if model != "gpt-oss-20b":
        params = SyntheticParams(prompt_tokens=200, output_tokens=40)
        write_synthetic(path, preset(model), requests=4 * requests, params=params)
        return path
    recorded = Path(os.environ.get("MOELESS_SHARED_DATA", "../shared/data")) / "routing" / "gpt-oss-20b.npz"
    if not recorded.is_file():
        return None
    from moeless.traces.importers.npz import import_npz

    import_npz(recorded, path, preset(model))
    return path


def run_model(model: str, requests: int, batching: str, rate: float | None) -> list[dict[str, Any]]:
    """Result rows, with intervals, of every cost model and policy; one that does not fit in memory is left out, and
    said."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        trace = trace_of(model, Path(scratch), requests)
        if trace is None:
            return rows
        config = BenchConfig(
            trace=trace,
            policies=tuple(Policy.parse(text) for text in dict.fromkeys(text for text, _ in POLICIES)),
            costs=("paper", "roofline"),
            cluster=MODELS[model],
            batching=batching,
            request_rate=rate,
            max_requests=requests,
        )
        bench = Bench(config)
        for costs in config.costs:
            for text, slots in POLICIES:
                bench.config, begun = replace(config, extra_slots=slots), time.perf_counter()
                try:
                    simulation = bench.run_cell(costs, Policy.parse(text))
                except RunFailed as error:
                    print(f"{model}, {costs}, {text}, {slots} extra slots: {error}", flush=True)
                    continue
                row = intervals.row(simulation, bench.spec, bench.cluster.G)
                row["layer"]["cdf_ms"] = []
                name, took = claims_table.name_of(simulation.cell), time.perf_counter() - begun
                print(
                    f"{model}, {costs}, {name}: {1e3 * row['layer']['mean_ms']:.4g} us a layer, {took:.0f} s",
                    flush=True,
                )
                rows.append(row)
    return rows


def run(counts: Mapping[str, int], batching: str, rate: float | None) -> list[dict[str, Any]]:
    """All models, two at a time; the result does not depend on that."""
    # the longest first; spawned: compiled code may have started threads here
    order = sorted(MODELS, key=lambda model: model != "gpt-oss-20b")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as workers:
        asked = {model: workers.submit(run_model, model, counts[model], batching, rate) for model in order}
        return [row for model in MODELS for row in asked[model].result()]


def main() -> None:
    """Run and write ``result.json`` and ``table.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--gpt-oss-requests", type=int, help="recorded answers are ten times as long: half as many")
    parser.add_argument("--batching", default="one-second")
    parser.add_argument("--rate", type=float, default=None, help="requests per second; default: the trace's own")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    requests = min(arguments.requests, 6) if arguments.quick else arguments.requests
    recorded = arguments.gpt_oss_requests or max(4, requests // 2)
    state, counts = git_state(), {model: recorded if model == "gpt-oss-20b" else requests for model in MODELS}
    rows = run(counts, arguments.batching, arguments.rate)
    rate = "" if arguments.rate is None else f" --rate {arguments.rate:g}"
    command = f"python -m moeless.experiments.claims --requests {requests} --gpt-oss-requests {recorded}"
    command += f" --batching {arguments.batching}{rate}"
    result = Result(command, tuple(claims_table.cells_of(rows)))
    write_result(arguments.out / "result.json", result)
    write_text(arguments.out / "table.md", claims_table.document(rows, command, state))


if __name__ == "__main__":
    main()
