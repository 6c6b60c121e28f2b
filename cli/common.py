"""Options and output helpers that every command shares.

A command is a function with Typer annotations that returns a :class:`Report`. Results go to standard output (tables, or
JSON with ``--json``), progress and remarks to standard error; progress only where that is a terminal.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args, get_origin

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from moeless.configuration import Component, Option, Seeded, options, typed
from moeless.credentials import mask_json
from moeless.errors import RunFailed, UserError

if TYPE_CHECKING:
    from moeless.tracking.run import Run


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


_SEED = options(Seeded)["seed"]
SeedOption = Annotated[int, typer.Option(_SEED.flag, min=_SEED.minimum, help=_SEED.help)]
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


class Report(NamedTuple):
    """What a command has to say.

    Attributes:
        data: what ``--json`` prints, JSON-ready.
        parts: what is printed otherwise: tables, lines of text, and remarks (plain strings) on standard error.
        failure: why the run failed for all that, in one sentence.
    """

    data: Any
    parts: Iterable[Table | Text | str] = ()
    failure: str = ""


def command(
    configurations: Mapping[str, type[Component]] | None = None,
    *,
    only: Sequence[str] = (),
    several: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., Report]], Callable[..., None]]:
    """Make a function a command: it gets ``--json`` and ``--config``, its report is printed.

    With configurations it also gets their options, as ``given``, by field name. What several have is one option; where
    their defaults differ it has none, and help tells. A group that one of several has names its backend.

    Args:
        configurations: by backend.
        only: names of the options that the command has, in place of all.
        several: options that may be repeated here.
        defaults: the command's own, by name; such an option is given once.
    """
    backends, own = configurations or {}, defaults or {}
    known: dict[str, dict[str, Option]] = {}
    for backend, configuration in backends.items():
        for name, found in options(configuration).items():
            if not only or name in only:
                known.setdefault(name, {})[backend] = found
    generated = []
    for name, by_backend in known.items():
        first = next(iter(by_backend.values()))
        kind, default = first.kind, first.default
        if name in own:
            kind, default = type(own[name]), own[name]
        elif name in several:
            kind, default = list[_present(kind)], None  # type: ignore[misc]
        elif any(found.default != default for found in by_backend.values()):
            default = None
        texts = [f"{backend} {found.unset}" for backend, found in by_backend.items() if found.unset]
        if len({found.unset for found in by_backend.values()}) == 1:
            texts = [first.unset] if first.unset else []
        suffix = f" (--backend {', '.join(by_backend)})" if len(by_backend) < len(backends) else ""
        typed_as = typer.Option(
            *first.flag.split(),
            help=first.help + " Repeatable." * (get_origin(kind) is list),
            show_default="; ".join(texts) if default is None and texts else True,
            min=first.minimum,
            metavar=first.metavar or (f"<{_present(kind).__name__}>" if get_origin(kind) is list else None),
            rich_help_panel=first.group and first.group + suffix,
        )
        generated.append(_parameter(name, kind if default is not None else kind | None, typed_as, default))

    def decorate(run: Callable[..., Report]) -> Callable[..., None]:
        def callback(as_json: bool, config: Path | None, **values: Any) -> None:
            given = {"given": {name: values.pop(name) for name in known}} if known else {}
            report = run(**given, **values)
            if as_json:
                print_json(report.data)
            for part in () if as_json else report.parts:
                show(part)
            if report.failure:
                raise RunFailed(report.failure)

        mine = [found for found in inspect.signature(run, eval_str=True).parameters.values() if found.name != "given"]
        parameters = [*mine, *generated, *_EVERYWHERE]
        callback.__doc__ = run.__doc__
        callback.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        callback.components = tuple(backends.values())  # type: ignore[attr-defined]
        return callback

    return decorate


def _present(kind: Any) -> Any:
    """The type of one value, without None."""
    return next((part for part in get_args(kind) if part is not NoneType), kind)


def _parameter(name: str, kind: Any, typed_as: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, typed_as]
    )


_EVERYWHERE = [
    _parameter("as_json", bool, typer.Option("--json", help="Print the result as JSON on standard output."), False),
    _parameter(
        "config",
        Path | None,
        typer.Option(
            "--config",
            callback=_read_config,
            is_eager=True,
            metavar="FILE",
            help="YAML file of options; flags override. A manifest and what --dry-run prints will do.",
        ),
        None,
    ),
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


def facts(title: str, values: Mapping[str, Any], columns: Sequence[str] = ("", "")) -> Table:
    """A table of names and their values as text."""
    return table(title, columns, [[name, str(value)] for name, value in values.items()])


def show(part: Table | Text | str) -> None:
    """Print a part of a report; tables in full width where standard output is a pipe or a file."""
    if isinstance(part, str):
        remarks.print(part)
    elif isinstance(part, Text) or output.is_terminal:
        output.print(part, soft_wrap=isinstance(part, Text))
    else:
        Console(width=200, soft_wrap=False).print(part)


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
