"""``moeless doctor``: what this machine offers and whether the installation is whole."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from moeless.cli import common


@common.command()
def command(
    deep: Annotated[bool, typer.Option("--deep", help="Also load the bundled model and generate with it.")] = False,
    clear_cache: Annotated[
        bool,
        typer.Option("--clear-cache", help="Remove the compiled functions instead; they are made again when needed."),
    ] = False,
) -> common.Report:
    """Check Python, packages, devices, bundled assets and what can run here.

    Example: moeless doctor --deep
    """
    if clear_cache:
        return _clear_cache()
    from moeless.doctor import examine

    checks = examine(deep=deep)
    marks = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "bad": "[red]bad[/red]"}
    rows = [[check.name, marks[check.state], check.finding] for check in checks]
    made = common.table("moeless doctor", ["what", "state", "finding"], rows)
    made.columns[2].justify = "left"
    bad = [check.name for check in checks if check.state == "bad"]
    failure = f"not everything that moeless needs is in order: {', '.join(bad)}" if bad else ""
    return common.Report([check.to_json() for check in checks], [made], failure)


def _clear_cache() -> common.Report:
    from moeless import jit

    removed = jit.clear_cache()
    path = None if removed.path is None else str(removed.path)
    said = "no compiled functions are kept: no folder for them can be written"
    if path is not None:
        said = f"removed {removed.bytes / 1e6:.1f} MB of compiled functions, {removed.files} files, from {path}"
    return common.Report({"removed": path, "files": removed.files, "bytes": removed.bytes}, [Text(said)])
