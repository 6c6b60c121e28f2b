"""Options and output helpers that every command shares.

A command is a function with Typer annotations. Results go to standard output (a table, or JSON with
``--json``), progress and remarks to standard error, and only where that is a terminal.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperCommand

from moeless.configuration import Component, Option, options, typed
from moeless.credentials import mask_json
from moeless.errors import UserError

if TYPE_CHECKING:
    from moeless.tracking.run import Run

T = TypeVar("T")


def _read_config(ctx: typer.Context, _param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Make a YAML file's entries the defaults of this command; flags still win.

    A key is an option's name. What ``--dry-run`` prints and a run's manifest are read as well: there, ``config`` holds
    values by the names of a configuration's fields.
    """
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
    if isinstance(loaded.get("config"), dict):
        loaded = typed(loaded["config"], getattr(ctx.command.callback, "components", ()))
    names = {
        key.lstrip("-").replace("-", "_"): parameter
        for parameter in ctx.command.params
        if parameter.name != "config"
        for key in (parameter.name or "", *parameter.opts, *parameter.secondary_opts)
    }
    defaults = dict(ctx.default_map or {})
    for key, entry in loaded.items():
        parameter = names.get(str(key).replace("-", "_"))
        if parameter is None:
            known = ", ".join(sorted({known.opts[0].lstrip("-") for known in names.values()}))
            raise UserError(f"--config: {value} sets {key!r}, which is no option of this command; there are: {known}")
        several = getattr(parameter, "multiple", False) and entry is not None and not isinstance(entry, list)
        defaults[parameter.name] = [entry] if several else entry
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


class Command(TyperCommand):
    """A command whose ``--help`` has a section for each group of options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[Any]] = {}
        for parameter in self.get_params(ctx):
            kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
            heading = getattr(parameter, "rich_help_panel", None) or kind
            sections.setdefault(heading, []).append(parameter.get_help_record(ctx))
        # what all commands have stands last
        for heading in sorted(sections, key="Options".__eq__):
            with formatter.section(heading):
                formatter.write_dl(sections[heading])


def command(
    run: Callable[..., None],
    configurations: Mapping[str, type[Component]],
    *,
    only: Sequence[str] = (),
    several: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Callable[..., None]:
    """A Typer callback with the configurations' options beside the parameters of ``run``.

    ``run`` gets the options' values as ``given``, by field name. What several configurations have is one option; where
    their defaults differ it has none here, and help tells. A group that one of several has names its backend.

    Args:
        configurations: by backend.
        only: names of the options that the command has, in place of all.
        several: options that may be repeated here.
        defaults: the command's own, by name; such an option is given once.
    """
    own = inspect.signature(run, eval_str=True).parameters
    found: dict[str, dict[str, Option]] = {}
    for backend, configuration in configurations.items():
        for name, known in options(configuration).items():
            if not only or name in only:
                found.setdefault(name, {})[backend] = known
    parameters = [parameter for name, parameter in own.items() if name != "given"]
    for name, by_backend in found.items():
        known, kind = next(iter(by_backend.values())), next(iter(by_backend.values())).kind
        default = known.default if all(known.default == other.default for other in by_backend.values()) else None
        if name in (defaults or {}):
            default = (defaults or {})[name]
            kind = type(default)
        elif name in several:
            default, kind = None, list[_present(kind)]  # type: ignore[misc]
        backend = f" (--backend {', '.join(by_backend)})" if len(by_backend) < len(configurations) else ""
        typer_option = typer.Option(
            *known.flag.split(),
            help=known.help + (" Repeatable: a sweep." if name in several else ""),
            min=known.minimum,
            metavar=known.metavar,
            rich_help_panel=known.group and known.group + backend,
        )
        kind = kind if default is not None else kind | None
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, typer_option]
            )
        )

    def callback(**values: Any) -> None:
        given = {name: values.pop(name) for name in found}
        run(given=given, **values)

    callback.__doc__ = run.__doc__
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    callback.components = tuple(configurations.values())  # type: ignore[attr-defined]
    return callback


def _present(kind: Any) -> Any:
    """A type without None."""
    return next((part for part in get_args(kind) if part is not type(None)), kind)


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
