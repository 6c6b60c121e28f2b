"""The bundled model served for real: the live column of the claims, and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeless.errors import UserError
from moeless.experiments import serving
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import bundled
from moeless.experiments.statements import Finding, Measured
from moeless.metrics.result import Cell, read_result
from moeless.report import result_page

RANKS = 8


def check(run: Path) -> None:
    """Refuse a folder that holds no live result.

    Raises:
        UserError: it is no run, or none of its rows was measured.
    """
    path = run / "result.json"
    if not path.is_file():
        raise UserError(f"--live: {run} holds no result.json; give the folder of a `serve-bench --backend live` run")
    if not any(cell.evidence == "measured" for cell in read_result(path).cells):
        raise UserError(f"--live: {run} was simulated; give the folder of a `serve-bench --backend live` run")


def wanted(options: Options) -> bool:
    """Whether claims have a live column: the bundled model says nothing about the reader's own traces."""
    return options.live is not None or not options.traces or options.beside


def lacks(options: Options) -> str | None:
    """Why there is no live run to show."""
    if wanted(options):
        return None
    return "it runs the bundled model; give --live RUN for a live run of your own model, or --beside"


def jobs(options: Options) -> Mapping[str, Job]:
    """One live run of every policy, under the name ``live``; none where the reader brings it, or it says nothing."""
    if options.live is not None or not wanted(options):
        return {}
    source = bundled(options)
    params = {
        "policies": ["static", "eplb", serving.moeless_policy(source), "elastic"],
        "ranks": RANKS,
        "requests": options.pick(16, 100),
        "output_tokens": 32,
        "request_rate": None,
        "seed": options.seed,
    }
    needs = tuple(source.fitted.values())
    return {
        "live": Job("serve the bundled model live", "moeless.experiments.cells.live:serve", params, needs, timed=True)
    }


def cells(options: Options, results: Mapping[str, Any]) -> list[Cell]:
    """The live rows; empty where there are none."""
    if options.live is not None:
        return list(read_result(options.live / "result.json").cells)
    return [serving.cell(data) for data in results["live"]["cells"]] if "live" in results else []


def change(rows: list[Cell], against: str, mine: str, theirs: str) -> dict[str, Measured]:
    """How MoEless differs from another system in per cent, as the live side of a claim; empty where one did not run.

    Args:
        mine, theirs: metrics that are read of each.
    """
    if not {"moeless", against} <= {cell.policy.partition(":")[0] for cell in rows}:
        return {}
    return {"live": Measured({rows[0].model: serving.changed(rows, against, mine, theirs)}, "%", mine, "live")}


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    rows = cells(options, results)
    model = f"{rows[0].model} on {rows[0].cluster}"
    label = "bundled model" if rows[0].model == "bundled" else ""
    text = [_how_timed(rows[0], results["live"]["cores"])] if "live" in results else []
    plots = {
        "time": Plot(
            result_page.layer_time_parts(rows, "Live MoE-layer time"),
            f"Where a MoE layer's time goes when {model} really serves; control is forecasting, planning and "
            "dispatch in Python on the same processor cores.",
            "measured",
            label,
        ),
        "bills": Plot(
            result_page.bills(rows, "Three bills of the live run"),
            f"The live run of {model} billed by three rules.",
            "measured",
            label,
            wide=True,
        ),
    }
    layers, bills = result_page.layer_table(rows), result_page.billing_table(rows)
    data = {
        "layers": Data(layers.columns, layers.rows, "MoE-layer time over all iterations and layers, live", show=True),
        "bills": Data(bills.columns, bills.rows, "The three bills, live"),
    }
    return Drawn(
        plots,
        data,
        findings=_findings(rows),
        text=text,
        warnings=list(dict.fromkeys(text for cell in rows for text in cell.warnings)),
    )


def _how_timed(cell: Cell, cores: int) -> str:
    """What a layer's time is, by the cell's own account of it."""
    if cell.settings.get("layer_time") == "wall clock":
        return (
            f"{RANKS} ranks have {cores} processor cores here, so a layer's time is the slowest rank's by the clock, "
            "the exchange between ranks included."
        )
    return (
        f"{RANKS} ranks share {cores} processor cores here, so a layer's time is the largest compute, control and "
        "stall time that any rank spent itself; the exchange between ranks is left out."
    )


def _findings(rows: list[Cell]) -> list[Finding]:
    checked = [cell.settings.get("verification") for cell in rows if not cell.lossy]
    if not all(checked):
        return []
    same, tokens = (sum(entry[name] for entry in checked if entry) for name in ("identical", "tokens"))
    worst = max(entry["max_difference"] for entry in checked if entry)
    return [
        Finding(
            "outputs-unchanged",
            "Elastic experts leave the model's outputs as they are",
            "{identical:,.0f} of {tokens:,.0f} greedy tokens identical under all policies, largest logit difference "
            "{worst:.1e}",
            {"identical": same, "tokens": tokens, "worst": worst},
            all(entry["passed"] for entry in checked if entry),
            "measured",
        )
    ]


EXPERIMENTS = (
    Experiment(
        name="live",
        title="Beyond the paper: the bundled model served live",
        question="What remains of the savings when a model is really served, control time included?",
        stated="",
        jobs=jobs,
        draw=_draw,
        lacks=lacks,
    ),
)
