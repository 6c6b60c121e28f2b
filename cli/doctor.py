"""``moeless doctor``: what this machine offers and whether the installation is whole."""

from __future__ import annotations

from typing import Annotated

import typer

from moeless.cli import common
from moeless.errors import RunFailed


def command(
    deep: Annotated[bool, typer.Option("--deep", help="Also load the bundled model and generate with it.")] = False,
    clear_cache: Annotated[
        bool,
        typer.Option("--clear-cache", help="Remove the compiled functions instead; they are made again when needed."),
    ] = False,
    config: common.ConfigOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Check Python, packages, devices, bundled assets and what can run here.

    Example: moeless doctor --deep
    """
    if clear_cache:
        _clear_cache(as_json)
        return
    from moeless.doctor import examine

    checks = examine(deep=deep)
    if as_json:
        common.print_json([check.to_json() for check in checks])
    else:
        marks = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "bad": "[red]bad[/red]"}
        rows = [[check.name, marks[check.state], check.finding] for check in checks]
        made = common.table("moeless doctor", ["what", "state", "finding"], rows)
        made.columns[2].justify = "left"
        common.show(made)
    bad = [check.name for check in checks if check.state == "bad"]
    if bad:
        raise RunFailed(f"not everything that moeless needs is in order: {', '.join(bad)}")


def _clear_cache(as_json: bool) -> None:
    from moeless import jit

    removed = jit.clear_cache()
    if as_json:
        path = None if removed.path is None else str(removed.path)
        common.print_json({"removed": path, "files": removed.files, "bytes": removed.bytes})
    elif removed.path is None:
        typer.echo("no compiled functions are kept: no folder for them can be written")
    else:
        typer.echo(
            f"removed {removed.bytes / 1e6:.1f} MB of compiled functions, {removed.files} files, from {removed.path}"
        )
