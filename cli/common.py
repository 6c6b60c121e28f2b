"""Options and output helpers that every command shares.

A command is a function with Typer annotations. Results go to standard output (a table, or JSON with
``--json``), progress and remarks to standard error, and only where that is a terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from moeless.credentials import mask_json
from moeless.errors import UserError

if TYPE_CHECKING:
    from moeless.tracking.run import Run

T = TypeVar("T")


def _read_config(ctx: typer.Context, _param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Make a YAML file's entries the defaults of this command; flags still win."""
    if value is None:
        return None
    import yaml

    try:
        loaded = yaml.safe_load(value.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config: {value} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config: cannot read {value} ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config: {value} is not valid YAML ({str(error).splitlines()[0]})") from None
    if loaded is None:
        loaded = {}
    if not isinstance(loaded, dict):
        raise UserError(f"--config: {value} must hold options as `name: value` lines")
    known = {parameter.name: parameter for parameter in ctx.command.params if parameter.name}
    spelled = {
        opt.lstrip("-"): name
        for name, parameter in known.items()
        for opt in (*parameter.opts, *parameter.secondary_opts)
    }
    defaults = dict(ctx.default_map or {})
    for key, entry in loaded.items():
        name = spelled.get(str(key), str(key).replace("-", "_"))
        if name not in known or name == "config":
            options = ", ".join(sorted(name.replace("_", "-") for name in known if name != "config"))
            raise UserError(f"--config: {value} sets {key!r}, which is no option of this command; there are: {options}")
        defaults[name] = entry
    ctx.default_map = defaults
    return value


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", callback=_read_config, is_eager=True, metavar="FILE", help="YAML file of options; flags override."
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved options and the memory and time plan, do nothing.")
]
QuickOption = Annotated[bool, typer.Option("--quick", help="A smaller, faster version of the same work.")]
WandbOption = Annotated[
    bool | None, typer.Option("--wandb/--no-wandb", help="Mirror the run to W&B (offline unless logged in).")
]
KeptRunOption = Annotated[
    bool | None,
    typer.Option("--wandb/--no-wandb", help="Keep a run folder and mirror it to W&B; default: where logged in."),
]
ArtefactOption = Annotated[Path, typer.Option("--out", metavar="PATH", help="Where the result is written.")]
RunFolderOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Run folder; default: a new one under ./results/runs.")
]

#: Everything that is not the command's result.
remarks = Console(stderr=True)
output = Console(soft_wrap=False)


def print_json(data: Any) -> None:
    """The command's result for programs: one JSON document on standard output."""
    sys.stdout.write(json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False, default=str) + "\n")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table whose first column is left-aligned text and the rest right-aligned."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, str) else f"{cell:,.4g}" if cell is not None else "–" for cell in row))
    return made


def show(made: Table) -> None:
    """Print a table; in full width where standard output is a pipe or a file."""
    if output.is_terminal:
        output.print(made)
    else:
        Console(width=200, soft_wrap=False).print(made)


def dry_run(config: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Print what would be done and stop with exit status 0."""
    print_json(mask_json({"config": dict(config), "plan": dict(plan)}))
    raise typer.Exit(0)


@contextmanager
def artefact_run(
    command: str, name: str, config: Mapping[str, Any], seed: int | None, inputs: Sequence[Path], wandb: bool | None
) -> Iterator[Run | None]:
    """A run folder for a command whose result is the artefact itself; None where W&B is not to see it.

    It is kept with ``--wandb`` (offline unless logged in), and without a word where W&B is online anyway, if the
    working folder can be written.
    """
    from moeless.tracking.wandb import choose_mode

    if wandb is False or (wandb is None and choose_mode(None) != "online"):
        yield None
        return
    from moeless.files import check_writable
    from moeless.tracking.run import RUNS, start_run

    if wandb is None:
        try:
            check_writable(RUNS)
        except UserError as error:
            remarks.print(f"! no run folder is kept for W&B ({error}); --no-wandb says so without asking")
            yield None
            return

    with start_run(command, name, config, seed, inputs, None, wandb) as run:
        yield run
        remarks.print(f"run folder: {run.path}")


@contextmanager
def progress(enabled: bool = True) -> Iterator[Progress]:
    """A progress bar on standard error, silent where that is not a terminal."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=remarks,
        transient=True,
        disable=not (enabled and remarks.is_terminal),
    ) as bar:
        yield bar


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Yield items under a progress bar."""
    with progress() as bar:
        task = bar.add_task(description, total=len(items))
        for item in items:
            yield item
            bar.advance(task)
