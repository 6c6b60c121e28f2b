"""``moeless evaluate-predictor``: measure a load predictor on a routing trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moeless.cli import common


@common.command()
def command(
    predictor: Annotated[Path, typer.Argument(help="Predictor folder made by train-predictor.")],
    trace: Annotated[Path, typer.Argument(help="Trace folder of kind tokens, of the same model.")],
    distance: Annotated[str, typer.Option("--distance", metavar="D", help="Distances: 1, 1..5 or 1,3.")] = "1",
    batch_tokens: Annotated[
        str, typer.Option("--batch-tokens", help="Tokens per iteration, comma-separated.")
    ] = "32,512",
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs for the straggler hit.")] = 8,
    split_by: Annotated[
        Literal["request", "category", "time"],
        typer.Option("--split-by", help="As in fitting, so that test requests are unseen."),
    ] = "request",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of metrics.json; default: the predictor's.")
    ] = None,
    seed: common.SeedOption = 0,
    dry: common.DryRunOption = False,
) -> common.Report:
    """Measure a predictor on the 30 % of requests that fitting did not see.

    Example: moeless evaluate-predictor predictors/la traces/bundled --distance 1..5 --batch-tokens 32,512,2048
    """
    from moeless.predictors.train_evaluate import FitJob, parse_numbers, run_evaluation

    job = FitJob(
        trace=trace,
        method="history",
        distances=parse_numbers(distance, "--distance"),
        split_by=split_by,
        batch_tokens=parse_numbers(batch_tokens, "--batch-tokens"),
        gpus=gpus,
        seed=seed,
    )
    if dry:
        common.dry_run(job.resolved() | {"predictor": str(predictor)}, {"iteration_sizes": list(job.batch_tokens)})
    done = run_evaluation(predictor, job, out)
    measured = common.table("Mean over layers, test requests", done.columns, done.table)
    return common.Report(done.summary, [common.facts(str(predictor), done.summary), measured])
