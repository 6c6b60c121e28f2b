"""The ``moeless`` command: finds each command's module when it is asked for, and turns errors into sentences."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from moeless import __version__, jit
from moeless.credentials import mask
from moeless.errors import RunFailed, UserError
from moeless.files import refusal
from moeless.machine import limit_threads

#: Command name to (module of ``moeless.cli`` with a Typer callback ``command``, one-line help).
#: The help stands here so that listing commands imports none of them.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "Run the whole pipeline on bundled defaults and write a page."),
    "doctor": ("doctor", "Check this machine and what is installed."),
    "models": ("models", "List model presets: shapes, bytes, FLOPs."),
    "trace": ("trace", "Record expert routing of a model on prompts."),
    "import-trace": ("import_trace", "Read routing recorded by another system."),
    "inspect": ("inspect", "Describe and check a routing trace."),
    "train-predictor": ("train_predictor", "Fit and evaluate a load predictor."),
    "evaluate-predictor": ("evaluate_predictor", "Measure a load predictor on a trace."),
    "tune": ("tune", "Search a policy's parameters through the simulator."),
    "plan": ("plan", "Plan replicas and placement of every layer."),
    "export-plan": ("export_plan", "Write a plan for SGLang, TensorRT-LLM or vLLM."),
    "profile": ("profile", "Measure a model's parts on this hardware."),
    "compare": ("compare", "Put runs side by side."),
    "reproduce": ("reproduce", "Reproduce the paper's figures and tables."),
    "serve-bench": ("serve_bench", "Serve a workload under policies, compare latency and cost."),
}


#: The base of Typer's command-line errors; newer versions bring their own copy of Click, so that
#: naming Click's class would miss them.
CommandLineError: Any = typer.BadParameter.__mro__[2]


class LazyGroup(TyperGroup):
    """A group that imports a command's module only when that command is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module_name, short_help = COMMANDS[cmd_name]
        from moeless.cli.common import Command

        module = importlib.import_module(f"moeless.cli.{module_name}")
        single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_show_locals=False)
        single.command(name=cmd_name, cls=Command, short_help=short_help)(module.command)
        return get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, short_help) for name, (_, short_help) in COMMANDS.items()])


app = typer.Typer(cls=LazyGroup, add_completion=False, rich_markup_mode=None, pretty_exceptions_show_locals=False)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"moeless {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
def moeless(
    ctx: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Elastic expert serving of Mixture-of-Experts models: trace, predict, plan, serve, bill, report."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def run(arguments: list[str] | None = None) -> None:
    """Entry point: exit status 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted."""
    limit_threads()
    if sys.stderr.isatty():
        announce_compiling()
    try:
        status: Any = app(args=arguments, standalone_mode=False)
    except UserError as error:
        _fail(str(error), 2)
    except RunFailed as error:
        _fail(str(error), 1)
    except CommandLineError as error:
        # the parser's own sentence; its usage block is noise
        _fail(error.format_message().rstrip(".").replace("\n", " "), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except BrokenPipeError:
        # the reader of our output has gone, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        sentence = refusal(error)
        if sentence is None:
            raise
        _fail(sentence, 2)
    else:
        # newer versions of Typer turn an interrupt into a status without a word
        if status == 130:
            _fail("interrupted", 130)
        sys.exit(status if isinstance(status, int) else 0)


def announce_compiling() -> None:
    """Say once, on standard error, when numerical functions have to be compiled because no cache holds them."""

    def remark() -> None:
        from moeless.cli import common

        common.remarks.print(
            "First use here: numerical functions are compiled along the way, which takes up to two minutes of "
            f"processor time; later runs take them from {jit.cache_root() or 'memory only, no folder can be written'}.",
            highlight=False,
            markup=False,
        )

    jit.on_compiling(remark)


def _fail(sentence: str, status: int) -> None:
    sys.stderr.write(f"moeless: {mask(sentence, sys.argv[1:])}\n")
    sys.exit(status)
