"""An index page over all runs of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeless.errors import UserError
from moeless.report import page
from moeless.tracking import find_runs, read_manifest


def write_index(root: Path) -> Path:
    """Write ``index.html`` into a folder of runs, newest first, with a link to each run's page.

    Raises:
        UserError: the folder holds no run.
    """
    runs = find_runs(root)
    if not runs:
        raise UserError(f"{root} holds no run")
    rows: list[list[Any]] = []
    skipped = []
    for path in reversed(runs):
        try:
            manifest = read_manifest(path)
        except UserError as error:
            skipped.append(str(error))
            continue
        has_page = (path / page.PAGE).is_file()
        rows.append(
            [
                page.Link(path.name, f"{path.name}/{page.PAGE}") if has_page else path.name,
                manifest["command"],
                manifest["name"],
                manifest["status"],
                manifest["start"],
                manifest["seconds"],
            ]
        )
    table = page.Table(["run", "command", "on", "status", "started", "seconds"], rows)
    text = f"{len(rows)} runs, newest first."
    return page.write(root, "Runs", text, [page.Section("All runs", [table])], warnings=skipped)
