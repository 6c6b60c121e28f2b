"""``moeless inspect``: what a routing trace holds, in a table, figures and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeless.cli import common


@common.command()
def command(
    trace: Annotated[Path, typer.Argument(help="Trace folder, of any kind.")],
    check: Annotated[bool, typer.Option("--check", help="Verify every hash and value first.")] = False,
    gpus: Annotated[int, typer.Option("--gpus", min=2, help="GPUs of the batch-size curve.")] = 8,
    figures: Annotated[
        bool, typer.Option("--figures/--no-figures", help="Write figures and a page to the run folder.")
    ] = True,
    out: common.RunFolderOption = None,
    seed: common.SeedOption = 0,
    wandb: common.WandbOption = False,
    dry_run: common.DryRunOption = False,
) -> common.Report:
    """Describe a routing trace: popularity, imbalance by batch size and GPU count, drift, co-activation.

    Example: moeless inspect traces/gpt-oss-20b --check
    """
    from moeless.traces.inspect import describe
    from moeless.traces.store import open_trace

    opened = open_trace(trace, check=check)
    if dry_run:
        spec = opened.spec
        common.dry_run(
            {"trace": str(trace), "check": check, "gpus": gpus, "figures": figures, "seed": seed},
            {"rows": opened.num_rows, "memory_bytes": opened.num_rows * spec.L * max(spec.K * 2, 1)},
        )
    made = describe(opened, gpus=gpus, seed=seed)
    written = None
    if figures:
        from moeless.report.trace_figures import write_page
        from moeless.tracking.run import start_run

        resolved = {"trace": str(trace), "check": check, "gpus": gpus, "seed": seed}
        with start_run("inspect", opened.spec.name, resolved, seed, [trace], out, wandb) as run:
            written = write_page(made, run, trace, opened.info.notes)
    facts = made.facts | ({"checked": "schema, hashes, ranges: all right"} if check else {})
    columns = ["window", *(f"{count} GPUs" for count in made.gpu_counts)]
    rows = [[name, *values] for name, values in made.windows]
    imbalance = common.table("Imbalance (max / mean), contiguous experts, mean over layers", columns, rows)
    remarks = [f"note: {note}" for note in opened.info.notes] + ([] if written is None else [f"page: {written}"])
    data = {**made.to_json(), "checked": check, "page": None if written is None else str(written)}
    return common.Report(data, [common.facts(f"Trace {trace}", facts), imbalance, *remarks])
