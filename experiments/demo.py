"""The demonstration: every stage of the pipeline on bundled defaults, and a page from the files they leave.

Each stage is one command line, printed as it runs, so that a reader can repeat any of them alone.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeless.files import read_json
from moeless.metrics.result import Result, read_result
from moeless.report import charts, page, result_page
from moeless.report.page import Figure, Section, Table, Text
from moeless.traces import TokenTrace, open_trace
from moeless.traces.compose import total_load
from moeless.traces.statistics import imbalance_L
from moeless.tracking.run import Run

LABEL = "bundled model"
PLANNERS = ("static", "eplb", "moeless", "elastic")
DISTANCES = "1..3"
#: Two ways to play the bundled model's routing: on its own, tiny experts, where fixed latencies are everything, and
#: on the experts of a model of the paper that has the same number of them.
SHAPES = {"own": None, "phi": "phi-3.5-moe"}
CLUSTER = "a6000x8"
METHODS = {
    "gate_reuse": "with the next layers' raw gates",
    "layer_aware": "with fine-tuned copies of the next layers' gates (the paper)",
}
POLICIES = ("static", "eplb:history", "moeless:layer_aware:1", "elastic:layer_aware:1", "oracle")


@dataclass(frozen=True)
class Size:
    """How much the demonstration does."""

    requests: int = 200
    new_tokens: int = 40
    batch: int = 20
    served: int = 120
    rate: float = 40.0


QUICK = Size(requests=32, new_tokens=12, batch=8, served=24)


@dataclass(frozen=True)
class Step:
    """One stage: what it shows, and the command line without ``moeless``."""

    stage: str
    title: str
    line: str

    @property
    def arguments(self) -> list[str]:
        """The command line as the words that a shell would pass."""
        return shlex.split(self.line)


def steps(folder: Path, size: Size, seed: int) -> list[Step]:
    """Every command of the demonstration, in order; all artefacts land under ``folder``."""

    def at(name: str) -> str:
        return shlex.quote(str(folder / name))

    trace, seeded = at("trace"), f"--seed {seed}"
    made = [
        Step(
            "trace",
            "Record which experts serve each token of the bundled model",
            f"trace bundled bundled --max-requests {size.requests} --max-new-tokens {size.new_tokens} "
            f"--batch-size {size.batch} --dtype float32 --router-inputs --out {trace} {seeded}",
        )
    ]
    for method, how in METHODS.items():
        made.append(
            Step(
                "predict",
                f"Forecast loads {how}",
                f"train-predictor {trace} --method {method} --distance {DISTANCES} --evaluate "
                f"--out {at(f'predictor-{method}')} {seeded}",
            )
        )
    for planner in PLANNERS:
        line = f"plan {trace} --planner {planner} --cluster {CLUSTER} --out {at(f'plan-{planner}.json')} {seeded}"
        made.append(Step("plan", f"Plan copies with {planner}", line))
    policies = " ".join(f"--policy {policy}" for policy in POLICIES)
    for name, model in SHAPES.items():
        made.append(
            Step(
                "serve, bill",
                f"Serve a production-like arrival process: bundled routing on {shapes(name)}",
                f"serve-bench --backend sim --trace {trace} --predictor {at('predictor-layer_aware')} "
                f"--cluster {CLUSTER} --arrivals azure-like --max-requests {size.served} --request-rate {size.rate} "
                f"{'' if model is None else f'--model {model} '}{policies} "
                f"--no-wandb --out {at(f'serve-{name}')} {seeded}",
            )
        )
    return made


def shapes(name: str) -> str:
    """What the experts of ``SHAPES[name]`` are, in words."""
    return "the model's own, tiny experts" if SHAPES[name] is None else f"experts of {SHAPES[name]}'s size"


def write_page(run: Run, made: Sequence[Step]) -> tuple[Path, Result]:
    """Draw figures and write ``index.html`` from the stages' files; returns the page and all result rows."""
    results = {name: read_result(run.path / f"serve-{name}" / "result.json") for name in SHAPES}
    trace = open_trace(run.path / "trace")
    assert isinstance(trace, TokenTrace)
    parts = [_commands(made), _routing(run, trace), _prediction(run), _plans(run)]
    whole = Result(
        str(run.manifest["command_line"]), tuple(cell for result in results.values() for cell in result.cells)
    )
    parts += result_page.result_sections(run, whole, LABEL)
    warnings = [f"{shapes(name)}: {text}" for name, result in results.items() for text in result_page.warnings(result)]
    run.write_result(whole)
    for warning in warnings:
        run.warn(warning)
    sentences = _summary(trace, results)
    written = page.write(
        run.path, "moeless demo", sentences, parts, manifest=run.manifest, warnings=warnings, label=LABEL
    )
    return written, whole


def _summary(trace: TokenTrace, results: dict[str, Result]) -> list[str]:
    first = (
        f"The bundled model's routing of {trace.num_tokens:,} tokens of {trace.num_requests} requests was recorded, "
        "forecast, planned for and served in simulation under five policies and two cost models."
    )
    told = result_page.summarise(results["phi"])
    return [first, f"On experts of {SHAPES['phi']}'s size: {told[1][:1].lower()}{told[1][1:]}", told[2]]


def _commands(made: Sequence[Step]) -> Section:
    rows = [[step.stage, step.title, f"`moeless {step.line}`"] for step in made]
    return Section("What ran", [Table(["stage", "what", "command"], rows)])


def _routing(run: Run, trace: TokenTrace) -> Section:
    topk = trace.load_topk()
    spec = trace.spec
    load_LE = total_load(topk, spec.E)
    heat = run.figure("popularity", charts.popularity(load_LE, "Expert popularity, bundled model"))
    series = {f"{gpus} GPUs": imbalance_L(load_LE[None], gpus) for gpus in (4, 8)}
    balance = run.figure(
        "imbalance", charts.layer_imbalance(series, title="Imbalance of all tokens, contiguous experts")
    )
    text = (
        f"{trace.num_tokens:,} tokens of {trace.num_requests} bundled prompts in "
        f"{len(set(trace.requests.category))} families, {spec.L} MoE layers, {spec.E} experts, top-{spec.K}."
    )
    return Section(
        "Routing",
        [
            Text(text),
            Figure(heat, "Load of each expert over an even share, by layer.", "measured", LABEL),
            Figure(balance, "Load of the fullest GPU over the mean, by layer; 1 is perfect.", "measured", LABEL),
        ],
    )


def _prediction(run: Run) -> Section:
    rows: list[list[Any]] = []
    series: dict[str, charts.Line] = {}
    for name in METHODS:
        entries = read_json(run.path / f"predictor-{name}" / "metrics.json")["rows"]
        found = [e for e in entries if e["metric"] == "topk_recall" and e["phase"] == "all"]
        for distance in sorted({e["distance"] for e in found}):
            chosen = [e for e in found if e["distance"] == distance]
            rows.append([name, distance, float(np.mean([e["value"] for e in chosen])), sum(e["n"] for e in chosen)])
        nearest = sorted((e for e in found if e["distance"] == 1), key=lambda e: e["layer"])
        bands = ([e[which] for e in nearest] for which in ("value", "low", "high"))
        series[name] = charts.Line([e["layer"] + 1 for e in nearest], *bands)
    figure = charts.lines(
        series,
        xlabel="MoE layer that is forecast",
        ylabel="top-k recall",
        title="Experts forecast one layer ahead, bundled model",
        whole_x=True,
    )
    path = run.figure("recall", figure)
    caption = "Share of the chosen experts that were forecast, mean over layers, requests that fitting never saw."
    return Section(
        "Prediction",
        [
            Figure(path, "One layer ahead, by layer; bands are 90 % intervals over requests.", "measured", LABEL),
            Table(["method", "distance", "top-k recall", "n"], rows, caption),
        ],
    )


def _plans(run: Run) -> Section:
    rows = []
    for name in PLANNERS:
        plan = read_json(run.path / f"plan-{name}.json")
        extras = sum(len(layer["expert"]) - sum(layer["primary"]) for layer in plan["layers"])
        rows.append([name, len(plan["layers"]), extras, f"plan-{name}.json"])
    caption = "Plans for the mean load of the trace, one extra slot a GPU and layer."
    return Section("Plans", [Table(["planner", "layers", "extra copies", "file"], rows, caption)])
