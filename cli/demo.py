"""``moeless demo``: the whole pipeline on bundled defaults, ending in a page and a summary table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from moeless.cli import common

if TYPE_CHECKING:
    from moeless.metrics import Cell


@common.command()
def command(
    quick: common.QuickOption = False,
    seed: common.SeedOption = 0,
    out: common.RunFolderOption = None,
    wandb: common.WandbOption = None,
    dry_run: common.DryRunOption = False,
) -> common.Report:
    """Run trace, predict, plan, serve, bill and report on the bundled model; a few minutes on two cores.

    Example: moeless demo --quick
    """
    import sys
    from contextlib import redirect_stdout
    from pathlib import Path

    from moeless.cli.main import announce_compiling
    from moeless.experiments import demo
    from moeless.metrics.result import read_result
    from moeless.tracking.run import start_run

    size = demo.QUICK if quick else demo.Size()
    settings = {"quick": quick, "size": vars(size), "seed": seed}
    if dry_run:
        planned = demo.steps(Path(out or "RUN"), size, seed)
        common.dry_run(settings, {"commands": [f"moeless {step.line}" for step in planned]})
    announce_compiling()
    with start_run("demo", "bundled", settings, seed, [], out, wandb) as run:
        steps = demo.steps(run.path, size, seed)
        for number, step in enumerate(steps, 1):
            heading = f"\n{number} of {len(steps)}, {step.stage}: {step.title}"
            common.remarks.print(heading, style="bold", highlight=False, markup=False)
            common.remarks.print(f"$ moeless {step.line}", style="dim", highlight=False, markup=False)
            with redirect_stdout(sys.stderr):
                _invoke(step.arguments)
        page, result = demo.write_page(run, steps)
    tables = [
        _summary(demo.shapes(name), read_result(run.path / f"serve-{name}" / "result.json").cells)
        for name in demo.SHAPES
    ]
    data = {"run": str(run.path), "page": str(page), **result.to_json()}
    return common.Report(data, [*tables, Text(f"page: {page}")])


def _invoke(arguments: list[str]) -> None:
    from moeless.cli.main import app

    app(args=arguments, standalone_mode=False)


def _summary(shapes: str, cells: tuple[Cell, ...]) -> Table:
    columns = ["policy", "costs", "layer (µs)", "vs static", "imbalance", "TTFT (ms)", "TPOT (ms)"]
    columns += ["paper's bill (GB·s)", "vs static", "resident (GB·s)", "vs static", "GPU·s"]
    rows = []
    for cell in cells:
        static = next(c for c in cells if c.policy == "static" and c.costs == cell.costs)
        request = cell.request
        rows.append(
            [
                f"{cell.policy}{' †' if cell.lossy else ''}",
                cell.costs,
                f"{cell.layer.mean_ms * 1e3:,.4g}",
                f"{cell.layer.mean_ms / static.layer.mean_ms:.3f}",
                f"{cell.layer.imbalance:.2f}",
                None if request is None else request.mean_ttft_ms,
                None if request is None else request.mean_tpot_ms,
                cell.billing.paper,
                f"{cell.billing.paper / static.billing.paper:.3f}",
                cell.billing.resident,
                f"{cell.billing.resident / static.billing.resident:.3f}",
                cell.billing.gpu_seconds,
            ]
        )
    title = f"Bundled model's routing on {shapes}, {cells[0].cluster}, {cells[0].evidence}   († changes outputs)"
    return common.table(title, columns, rows)
