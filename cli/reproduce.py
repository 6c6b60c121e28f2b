"""``moeless reproduce``: the paper's figures and tables, from data to picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moeless.cli import common
from moeless.errors import RunFailed
from moeless.simulator.options import BenchConfig


@common.command({"sim": BenchConfig}, only=("cluster", "costs", "seed"), defaults={"cluster": "a6000x8"})
def command(
    given: Mapping[str, Any],
    what: Annotated[str, typer.Argument(help="fig1, fig3, ..., table1, table2, a study, or all.")],
    full: Annotated[bool, typer.Option("--full/--quick", help="The paper's sizes, or minutes on two cores.")] = False,
    model: Annotated[list[str] | None, typer.Option("--model", help="Model preset; repeatable.")] = None,
    trace: Annotated[
        list[Path] | None,
        typer.Option("--trace", metavar="DIR", help="Your routing trace, in place of every other source; repeatable."),
    ] = None,
    beside: Annotated[
        bool, typer.Option("--beside", help="Show your traces next to the other sources, not in their place.")
    ] = False,
    live: Annotated[
        Path | None,
        typer.Option("--live", metavar="RUN", help="Live serve-bench run for the live column; default: make one."),
    ] = None,
    billing: Annotated[
        str, typer.Option("--billing", help="Bill shown first: paper, resident, gpu_seconds.")
    ] = "paper",
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes at a time.")] = 2,
    cache: Annotated[Path, typer.Option("--cache", metavar="DIR", help="Where results are kept.")] = Path(
        "results/.cache"
    ),
    out: common.RunFolderOption = None,
    wandb: common.WandbOption = None,
    dry_run: common.DryRunOption = False,
) -> common.Report:
    """Reproduce a figure or table of the paper, or all of them; interrupted runs continue where they stopped.

    Example: moeless reproduce fig8 --quick
    """
    from moeless.experiments import reproduce
    from moeless.experiments.base import Options

    options = Options(
        full=full,
        models=tuple(model or ()),
        traces=tuple(trace or ()),
        beside=beside,
        live=live,
        cluster=given["cluster"],
        costs=tuple(given["costs"] or BenchConfig.costs),
        billing=billing,
        seed=given["seed"],
    )
    plan = reproduce.prepare(what, options, cache)
    if dry_run:
        common.dry_run(plan.config(), plan.estimate(jobs))
    with common.progress() as bar:
        task = bar.add_task("", total=None)
        try:
            page, record = plan.run(
                out=out,
                wandb=wandb,
                workers=jobs,
                progress=lambda done, total, label: bar.update(task, completed=done, total=total, description=label),
            )
        except (KeyboardInterrupt, RunFailed):
            common.remarks.print(f"finished results are kept in {cache}; the same command continues from there")
            raise
    rows = [
        [entry["name"], entry["title"], len(entry["figures"]), entry["computed"], entry["seconds"]]
        for entry in record["experiments"]
    ]
    parts = [common.table("Reproduced", ["name", "experiment", "figures", "computed", "seconds"], rows)]
    claims = [claim for entry in record["experiments"] for claim in entry["claims"]]
    columns = ["claim", "paper", "ours, its rules", "ours, physical", "live", "evidence"]
    keys = ("statement", "paper", "paper_rules", "physical", "live", "kind")
    if claims:
        parts.append(common.table("Claims", columns, [[claim[key] for key in keys] for claim in claims]))
    remarks = [f"! {problem}" for problem in (*plan.left_out, *plan.cache.problems)]
    return common.Report(record, [*parts, *remarks, f"page: {page}"])
