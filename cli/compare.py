"""``moeless compare``: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from moeless.cli import common


@common.command()
def command(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN...", help="Run folders; none: an index over all runs.")
    ] = None,
    root: Annotated[Path, typer.Option("--root", metavar="DIR", help="Folder of runs that is indexed.")] = Path(
        "results/runs"
    ),
    out: common.RunFolderOption = None,
) -> common.Report:
    """Compare runs in a table and a page; without runs, write an index page over all of them.

    Example: moeless compare results/runs/20260306T120000Z-serve-bench-a results/runs/20260306T130000Z-serve-bench-b
    """
    from moeless.report import compare, page
    from moeless.tracking import start_run

    if not runs:
        written = compare.write_index(root)
        return common.Report({"index": str(written)}, [Text(f"index: {written}")])
    read = compare.read_runs(runs)
    inputs = [path / "result.json" for path in runs]
    with start_run(
        "compare", f"{len(runs)}-runs", {"runs": [str(path) for path in runs]}, None, inputs, out, False
    ) as run:
        written = page.write(
            run.path, "Runs side by side", compare.summary(read), compare.sections(read), manifest=run.snapshot()
        )
    tables = compare.rows(read)
    columns = list(compare.COLUMNS)
    data = {
        "tables": [
            {"costs": costs, "where": where, "rows": [dict(zip(columns, row, strict=True)) for row in rows]}
            for (costs, where), rows in tables.items()
        ],
        "differences": compare.differences(read),
        "page": str(written),
    }
    shown = [common.table(f"{where}, {costs} costs", columns, rows) for (costs, where), rows in tables.items()]
    return common.Report(data, [*shown, f"page: {written}"])
