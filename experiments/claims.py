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
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeless.contracts import Policy
from moeless.errors import RunFailed
from moeless.experiments import serving
from moeless.experiments.cells import intervals
from moeless.experiments.statements import CHANGES
from moeless.files import write_text
from moeless.metrics import Cell, Result, catalogue, write_result
from moeless.report.page import markdown
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
                name, took = name_of(simulation.cell), time.perf_counter() - begun
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


def name_of(cell: Cell) -> str:
    """The policy, with its extra slots where there is more than one."""
    slots = cell.settings.get("extra_slots", 1)
    return cell.policy + (f", {slots} extra slots" if slots != 1 else "")


Rows = Sequence[Mapping[str, Any]]
#: Baselines in the order of the tables.
MEGATRON, EPLB, ORACLE = "static", "eplb:history", "oracle"


def _groups(rows: Rows) -> dict[tuple[str, str], dict[str, Mapping[str, Any]]]:
    """Result rows by (model, costs), then by name."""
    groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        cell = serving.cell(row)
        groups.setdefault((cell.model, cell.costs), {})[name_of(cell)] = row
    return groups


def _where(model: str, mine: Mapping[str, Mapping[str, Any]]) -> str:
    one = serving.cell(next(iter(mine.values())))
    return f"{model} ({one.evidence}, {one.cluster})"


def _of(row: Mapping[str, Any] | None, key: str) -> float | None:
    """A metric of a result row; None without the row."""
    return None if row is None else catalogue.BY_KEY[key].of(serving.cell(row))


def _lead(model: str, costs: str, mine: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    return [_where(model, mine), costs, name + (" †" if serving.cell(mine[name]).lossy else "")]


def _change(mine: float | None, theirs: float | None) -> str | None:
    return f"{serving.change(mine, theirs):+.1f}".replace("-", "−") if mine is not None and theirs else None


def certain(rows: Rows) -> str:
    """Changes with 90 % intervals, both runs resampled in the same blocks of iterations."""
    columns = ["model", "costs", "policy", "latency vs Megatron-LM", "latency vs EPLB", "paper bill vs Megatron-LM"]
    pairs = ((MEGATRON, "layer.mean_ms"), (EPLB, "layer.mean_ms"), (MEGATRON, "billing.paper"))
    lines = [
        [model, costs, name, *(_interval(row, mine.get(base), key) for base, key in pairs)]
        for (model, costs), mine in _groups(rows).items()
        for name, row in mine.items()
        if name not in (MEGATRON, ORACLE) and MEGATRON in mine
    ]
    return markdown(columns, lines)


def _interval(mine: Mapping[str, Any], base: Mapping[str, Any] | None, key: str) -> str | None:
    if base is None or mine is base:
        return None
    middle, low, high = (100 * (value - 1) for value in serving.ratio(mine, base, key))
    known = "" if low != low else f" [{low:+.1f}, {high:+.1f}]"
    return f"{middle:+.1f}{known}".replace("-", "−")


def absolute(rows: Rows) -> str:
    """One row per model, cost model and policy: layer time and every bill."""
    lines = [
        [*_lead(model, costs, mine, name), *catalogue.texts("claims", serving.cell(row))]
        for (model, costs), mine in _groups(rows).items()
        for name, row in mine.items()
    ]
    return markdown(["model", "costs", "policy", *catalogue.headings("claims")], lines)


def relative(rows: Rows) -> str:
    """One row per model, cost model and system, the baselines too: changes against each baseline, the paper's first."""
    bills = {bill.key: bill.columns["claims"].label.removesuffix(f" {bill.unit}") for bill in catalogue.BILLS}
    columns = ["model", "costs", "policy", "latency vs Megatron-LM", "vs EPLB", "vs Oracle"]
    columns += [f"{bill} vs {other}" for bill in bills.values() for other in ("Megatron-LM", "Oracle", "EPLB")]
    stated = [f"{value:+.2f}".replace("-", "−") for value in CHANGES.values()]
    lines = [["the paper", None, "MoEless", *stated[:2], None, *stated[2:], *([None] * 7)]]
    compared = [("layer.mean_ms", base, "layer.mean_ms") for base in (MEGATRON, EPLB, ORACLE)]
    compared += [(bill, base, bill) for bill in bills for base in (MEGATRON, ORACLE, EPLB)]
    compared.append(("billing.paper", MEGATRON, "billing.paper_whole"))
    lines += [
        [
            *_lead(model, costs, mine, name),
            *(_change(_of(row, key), _of(mine.get(base), theirs)) for key, base, theirs in compared),
        ]
        for (model, costs), mine in _groups(rows).items()
        for name, row in mine.items()
        if MEGATRON in mine
    ]
    return markdown([*columns, "own layer vs Megatron-LM's all layers"], lines)


def implied() -> dict[str, float]:
    """What the paper's five means imply of each other if they compose, relative to Megatron-LM.

    Latencies, and costs over latencies, which is the memory that is billed.
    """
    kept = {key: 1.0 + value / 100.0 for key, value in CHANGES.items()}
    mine, cost = kept["layer.mean_ms", "static"], kept["billing.paper", "static"]
    eplb_latency, eplb_cost = mine / kept["layer.mean_ms", "eplb"], cost / kept["billing.paper", "eplb"]
    return {
        "MoEless latency": mine,
        "MoEless memory": cost / mine,
        "EPLB latency": eplb_latency,
        "EPLB memory": eplb_cost / eplb_latency,
        # the oracle holds what Megatron-LM holds: its cost is its latency
        "Oracle latency": cost / kept["billing.paper", "oracle"],
    }


def needed(rows: Rows) -> str:
    """What would have to be true for the paper's figures, beside what is, under the paper's own costs."""
    want, best = implied(), "moeless:oracle:1"
    latency, memory = f"{want['MoEless latency']:.3f}", f"{want['MoEless memory']:.3f}"
    lines: list[list[str | None]] = [
        ["MoEless latency (perfect forecast)", latency],
        ["the same, 3 extra slots", latency],
        ["EPLB latency", f"{want['EPLB latency']:.3f}"],
        ["Oracle latency", f"{want['Oracle latency']:.3f}"],
        ["EPLB billed memory", f"{want['EPLB memory']:.2f}"],
        ["MoEless billed memory, own layer against own layer", memory],
        ["MoEless billed memory, own layer against all layers", memory],
        ["layer times that each copy is billed for, so that the cost is the paper's", None],
    ]
    columns = ["quantity, relative to Megatron-LM", "the paper implies"]
    for (model, costs), mine in _groups(rows).items():
        if costs != "paper" or MEGATRON not in mine:
            continue
        columns.append(_where(model, mine))
        layers = preset(model).L

        def over(name: str, key: str, base: str = "", mine: Mapping[str, Any] = mine) -> float | None:
            one, other = _of(mine.get(name), key), _of(mine[MEGATRON], base or key)
            return None if one is None or not other else one / other

        held = over(best, "layer.replicas")
        billed = over(best, "billing.paper", "billing.paper_whole")
        stated = 1 + CHANGES["billing.paper", "static"] / 100
        figures = [over(name, "layer.mean_ms") for name in (best, f"{best}, 3 extra slots", EPLB, ORACLE)]
        figures += [over(EPLB, "layer.replicas"), held, None if held is None else held / layers]
        forms = (".3f", ".3f", ".3f", ".3f", ".2f", ".3f", ".3f")
        texts = [None if value is None else f"{value:{form}}" for value, form in zip(figures, forms, strict=True)]
        for line, text in zip(lines, [*texts, f"{stated / billed:.1f} of {layers}" if billed else None], strict=True):
            line.append(text)
    return markdown(columns, lines)


def document(rows: Rows, command: str, state: Mapping[str, Any] | None) -> str:
    """The whole file; ``state`` is the code's revision, as ``tracking.environment.git_state`` tells it."""
    want, cells = implied(), [serving.cell(row) for row in rows]
    code = "outside a checkout" if state is None else state["revision"] + (", changed" if state["dirty"] else "")
    served = {cell.model: f"{cell.settings['requests']} ({cell.layer.samples:,} layer runs)" for cell in cells}
    return (
        f"# Claims\n\nCommand: `{command}`. Code: {code}. Requests: "
        f"{', '.join(f'{model} {count}' for model, count in served.items())}.\n\n"
        "Changes in per cent, lower is better. Megatron-LM is `static`. Evidence: *synthetic* is made-up routing with "
        "the model's shapes, *simulated* is real routing. † changes the model's outputs. `moeless:oracle` has perfect "
        "forecasts, which the paper's system cannot exceed.\n\n"
        f"## Against each baseline\n\n{relative(rows)}\n"
        "The paper bill counts every system's experts only while their own layer runs. The last column bills "
        "Megatron-LM for all layers' experts all the time, MoEless by its own rule.\n\n"
        f"## How sure\n\n{certain(rows)}\n"
        f"Per cent; {serving.PAIRED}. They speak of this workload's iterations, not of other models or days.\n\n"
        f"## What would have to be true\n\n{needed(rows)}\n"
        "If the paper's five means compose, MoEless is billed for "
        f"{want['MoEless memory']:.3f} of Megatron-LM's memory, EPLB for {want['EPLB memory']:.2f} times as much, and "
        f"the Oracle takes {want['Oracle latency']:.3f} of Megatron-LM's time, so that Megatron-LM's slowest GPU takes "
        f"{1 / want['Oracle latency']:.2f} times the mean. A plan holds at least one copy of every expert: billed by "
        "one rule for all, MoEless's memory cannot lie below Megatron-LM's. The stated savings need a baseline that is "
        "billed for all its layers while MoEless is billed for some. The last row says for how many layer times each "
        "of MoEless's copies would be billed (its own, those before it in which it is pre-warmed, those after it in "
        "which it is kept) if the stated saving against Megatron-LM were met exactly.\n\n"
        f"## Absolute figures\n\n{absolute(rows)}"
    )


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
    result = Result(command, tuple(serving.cell(row) for row in rows))
    write_result(arguments.out / "result.json", result)
    write_text(arguments.out / "table.md", document(rows, command, state))


if __name__ == "__main__":
    main()
