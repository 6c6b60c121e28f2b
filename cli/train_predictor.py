"""``moeless train-predictor``: fit a load predictor on a routing trace."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moeless.cli import common


@common.command()
def command(
    trace: Annotated[Path, typer.Argument(help="Trace folder of kind tokens; gate methods need its router inputs.")],
    out: common.ArtefactOption,
    method: Annotated[
        str,
        typer.Option(
            "--method", metavar="NAME", help="layer_aware, gate_reuse, from_scratch, transition, blend or frequency."
        ),
    ] = "layer_aware",
    distance: Annotated[str, typer.Option("--distance", metavar="D", help="Distances: 1, 1..5 or 1,3.")] = "1",
    model: Annotated[
        str | None,
        typer.Option("--model", help="Model whose gates are used: bundled, folder or cached hub id; default: trace's."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="layer_aware: fine-tune where recall is below; default 0.8.")
    ] = None,
    param: Annotated[
        list[str] | None, typer.Option("--param", metavar="NAME=VALUE", help="A method's parameter; repeatable.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Training tokens at most.")] = 50_000,
    split_by: Annotated[
        Literal["request", "category", "time"], typer.Option("--split-by", help="What separates test from training.")
    ] = "request",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or auto.")] = "auto",
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Measure on test requests into metrics.json.")] = False,
    batch_tokens: Annotated[
        str, typer.Option("--batch-tokens", help="--evaluate: tokens per iteration, comma-separated.")
    ] = "32,512",
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="--evaluate: GPUs for the straggler hit.")] = 8,
    quick: common.QuickOption = False,
    wandb: common.KeptRunOption = None,
    seed: common.SeedOption = 0,
    dry: common.DryRunOption = False,
) -> common.Report:
    """Fit a load predictor on 70 % of a trace's requests.

    Example: moeless train-predictor traces/bundled --method layer_aware --distance 1..5 --out predictors/la --evaluate
    """
    from moeless.predictors.train_evaluate import FitJob, parse_numbers, run_fit

    options: dict[str, Any] = {"threshold": threshold} if threshold is not None else {}
    job = FitJob(
        trace=trace,
        method=method,
        distances=parse_numbers(distance, "--distance"),
        model=model,
        options=options,
        assignments=tuple(param or ()),
        max_tokens=min(max_tokens, 8_000) if quick else max_tokens,
        split_by=split_by,
        device=device,
        evaluate=evaluate,
        batch_tokens=parse_numbers(batch_tokens, "--batch-tokens"),
        gpus=gpus,
        seed=seed,
    )
    if dry:
        common.dry_run(job.resolved() | {"out": str(out)}, job.estimate())
    with common.progress() as bar:
        task = bar.add_task(method, total=None)

        def report(what: str, step: int, values: Any, run: Any = None) -> None:
            if run is not None:
                run.log({"step": step} | {f"{what}/{name}": value for name, value in values.items()})
            # curves of single layers are for W&B, not for one line
            shown = " ".join(f"{name} {value:.4g}" for name, value in values.items() if "/" not in name)
            bar.update(task, completed=step, description=f"{what} {shown}")

        with common.artefact_run("train-predictor", method, job.resolved(), seed, [trace], wandb) as run:
            done = run_fit(job, out, partial(report, run=run))
            if run is not None:
                run.produced(out, "predictor")
    shown = {name: f"{value:,.4g}" if isinstance(value, float) else value for name, value in done.summary.items()}
    parts = [common.facts(f"{method} -> {out}", shown)]
    if done.table:
        parts.append(common.table("Mean over layers, test requests", done.columns, done.table))
    return common.Report({"out": str(out)} | done.summary, parts)
