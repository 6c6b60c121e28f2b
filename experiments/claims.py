"""The paper's five headline figures beside ours: latency and cost against each baseline, by two cost models.

Run: python -m moeless.experiments.claims --out results/reference/claims [--quick]
The paper's three models are served with made-up routing (their real routing is out of reach), gpt-oss-20b with its
real routing where ../shared/data or MOELESS_SHARED_DATA has it. One-second batching and eight GPUs as in the paper.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moeless.cluster import cluster
from moeless.contracts import Policy
from moeless.errors import RunFailed
from moeless.experiments.cells import synthetic
from moeless.files import write_text
from moeless.metrics import Billing, Cell, Result, write_result
from moeless.simulator.bench import Bench, BenchConfig
from moeless.spec import preset

#: The oracle *predictor* knows the true loads: the best that any forecast can do for MoEless.
POLICIES = ("static", "eplb:history", "oracle", "moeless:oracle:1", "moeless:history:1", "elastic:history:1")
#: Llama-4-Scout with one extra copy per GPU and layer does not fit eight 48 GB GPUs beside its replicated weights.
MODELS = {"mixtral-8x7b": "a6000x8", "phi-3.5-moe": "a6000x8", "llama-4-scout": "h100x8", "gpt-oss-20b": "a6000x8"}
STATED = {"latency vs Megatron": -43.19, "latency vs EPLB": -21.89, "cost vs Megatron": -92.68}
STATED |= {"cost vs Oracle": -84.06, "cost vs EPLB": -95.11}


def traces(folder: Path, requests: int) -> Iterator[tuple[str, Path]]:
    """A trace per model; gpt-oss-20b only where its recording is there."""
    for model in list(MODELS)[:3]:
        made = folder / model
        made.mkdir()
        params = {"model": model, "requests": 4 * requests, "prompt_tokens": 60, "output_tokens": 40}
        synthetic.trace(params | {"dataset": "lmsys", "seed": 0}, [], made)
        yield model, made
    recorded = Path(os.environ.get("MOELESS_SHARED_DATA", "../shared/data")) / "routing" / "gpt-oss-20b.npz"
    if recorded.is_file():
        from moeless.traces.importers.npz import import_npz

        import_npz(recorded, folder / "gpt-oss-20b", preset("gpt-oss-20b"))
        yield "gpt-oss-20b", folder / "gpt-oss-20b"


def run(requests: int, batching: str) -> list[Cell]:
    """Every model, cost model and policy; a policy that does not fit in memory is left out, and said."""
    cells = []
    with tempfile.TemporaryDirectory() as scratch:
        for model, trace in traces(Path(scratch), requests):
            config = BenchConfig(
                trace=trace,
                policies=tuple(Policy.parse(text) for text in POLICIES),
                costs=("paper", "roofline"),
                cluster=cluster(MODELS[model]).name,
                batching=batching,
                request_rate=2.0,
                # recorded answers of gpt-oss are ten times as long
                max_requests=requests if model != "gpt-oss-20b" else max(4, requests // 8),
            )
            bench = Bench(config)
            for costs, policy in bench.cells:
                try:
                    cell = bench.run_cell(costs, policy).cell
                except RunFailed as error:
                    print(f"{model}, {costs}, {policy}: {error}", flush=True)
                    continue
                print(f"{model}, {costs}, {cell.policy}: {1e3 * cell.layer.mean_ms:.4g} us a layer", flush=True)
                cells.append(replace(cell, layer=replace(cell.layer, cdf_ms=())))
    return cells


def _change(mine: float | None, theirs: float | None) -> str:
    return f"{100 * (mine / theirs - 1):+.1f}" if mine is not None and theirs else "–"


def table(cells: list[Cell]) -> str:
    """Markdown: one row per model, cost model and elastic policy, in per cent against each baseline."""
    columns = ["model", "costs", "policy", "latency vs Megatron", "vs EPLB", "cost vs Megatron", "vs Oracle", "vs EPLB"]
    columns += ["own / whole vs Megatron", "resident vs Megatron", "GPU·s vs Megatron"]
    rows = [["the paper", "–", "MoEless", *(f"{value:+.2f}" for value in STATED.values()), "–", "–", "–"]]
    for model, costs in dict.fromkeys((cell.model, cell.costs) for cell in cells):
        mine = {cell.policy: cell for cell in cells if (cell.model, cell.costs) == (model, costs)}
        base, eplb, oracle = (mine.get(name) for name in ("static", "eplb:history", "oracle"))
        for name, cell in mine.items():
            if name in ("static", "oracle") or base is None:
                continue

            def bill(other: Cell | None, field: str, own: Billing = cell.billing) -> str:
                return _change(getattr(own, field), getattr(other.billing, field) if other else None)

            rows.append(
                [
                    f"{model} ({cell.evidence}, {cell.cluster})",
                    costs,
                    name,
                    _change(cell.layer.mean_ms, base.layer.mean_ms),
                    _change(cell.layer.mean_ms, eplb.layer.mean_ms if eplb else None),
                    bill(base, "paper"),
                    bill(oracle, "paper"),
                    bill(eplb, "paper"),
                    _change(cell.billing.paper, base.billing.paper_whole),
                    bill(base, "resident"),
                    bill(base, "gpu_seconds"),
                ]
            )
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def main() -> None:
    """Run and write ``result.json`` and ``table.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--batching", default="one-second")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    requests = min(arguments.requests, 6) if arguments.quick else arguments.requests
    cells = run(requests, arguments.batching)
    command = f"python -m moeless.experiments.claims --requests {requests} --batching {arguments.batching}"
    write_result(arguments.out / "result.json", Result(command, tuple(cells)))
    write_text(arguments.out / "table.md", f"Per cent, lower is better. Command: `{command}`\n\n{table(cells)}")
    print(table(cells))


if __name__ == "__main__":
    main()
