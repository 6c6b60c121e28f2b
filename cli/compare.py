"""``moeless compare``: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moeless.cli import common


def command(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN...", help="Run folders; none: an index over all runs.")
    ] = None,
    root: Annotated[Path, typer.Option("--root", metavar="DIR", help="Folder of runs that is indexed.")] = Path(
        "results/runs"
    ),
    out: common.RunFolderOption = None,
    as_json: common.JsonOption = False,
    config: common.ConfigOption = None,
) -> None:
    """Compare runs in a table and a page; without runs, write an index page over all of them.

    Example: moeless compare results/runs/20260306T120000Z-serve-bench-a results/runs/20260306T130000Z-serve-bench-b
    """
    from moeless.report import compare, page
    from moeless.tracking import start_run

    if not runs:
        written = compare.write_index(root)
        if as_json:
            common.print_json({"index": str(written)})
        else:
            common.output.print(f"index: {written}")
        return
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
    if as_json:
        common.print_json(
            {
                "tables": [
                    {"costs": costs, "where": where, "rows": [dict(zip(columns, row, strict=True)) for row in rows]}
                    for (costs, where), rows in tables.items()
                ],
                "differences": compare.differences(read),
                "page": str(written),
            }
        )
        return
    for (costs, where), rows in tables.items():
        plain: list[list[Any]] = [[None if cell is None else cell for cell in row] for row in rows]
        common.show(common.table(f"{where}, {costs} costs", columns, plain))
    common.remarks.print(f"page: {written}")
