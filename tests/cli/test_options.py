"""Options are declared once: command line, configuration files and manifests follow from the declaration."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from moeless.cli.main import COMMANDS
from moeless.cli.serve_bench import BACKENDS
from moeless.configuration import Component, options

Cli = Callable[..., tuple[int, str, str]]
TRACE = Path(__file__).resolve().parents[1] / "fixtures" / "traces" / "tokens"


def _components(base: type[Component] = Component) -> set[type[Component]]:
    return {base}.union(*(_components(below) for below in base.__subclasses__()))


def _parameters(name: str) -> list[Any]:
    app = typer.Typer()
    app.command(name)(importlib.import_module(f"moeless.cli.{COMMANDS[name][0]}").command)
    return list(get_command(app).params)


def test_an_option_is_declared_in_one_component() -> None:
    homes: dict[str, set[str]] = {}
    for component in _components():
        for name in inspect.get_annotations(component):
            field = component.__dataclass_fields__.get(name)
            if field is not None and "option" in field.metadata:
                homes.setdefault(field.metadata["option"].flag, set()).add(f"{component.__name__}.{name}")
    assert len(homes) > 40
    assert {flag: found for flag, found in homes.items() if len(found) > 1} == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_option_has_help_and_a_heading(backend: str) -> None:
    for known in options(BACKENDS[backend]).values():
        assert known.help.endswith("."), known.flag
        assert known.group or known.flag == "--seed"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_has_help_and_one_flag(name: str) -> None:
    parameters = [parameter for parameter in _parameters(name) if parameter.param_type_name == "option"]
    flags = [flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)]
    assert all(parameter.help for parameter in parameters)
    assert len(flags) == len(set(flags))


def test_help_has_a_section_for_each_group(cli: Cli) -> None:
    _, out, _ = cli("serve-bench", "--help")
    headings = [line for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert "Workload:" in headings
    assert "Serverless (--backend sim):" in headings
    assert "Live (--backend live):" in headings
    assert headings[-1] == "Options:"
    assert len(headings) == len(set(headings))


SIMULATED = (
    f"--trace {TRACE} --max-requests 3 --policy static --policy eplb:history --cluster cpu2 --cluster h100x8 "
    "--request-rate 1 --request-rate 2.5 --keep-alive lru --copies timed --goodput ttft:500 --fail-gpu 1:0:30"
)
LIVE = (
    "--backend live --device cpu --max-requests 2 --policy static --cluster cpu2 --costs roofline --request-rate 3 "
    "--keep-alive adaptive:3 --goodput tpot:50 --max-output 3 --no-predict --skip-below 4 --replan 7"
)


@pytest.mark.parametrize("line", [SIMULATED, LIVE])
def test_what_a_dry_run_prints_is_a_configuration_file(cli: Cli, tmp_path: Path, line: str) -> None:
    _, printed, err = cli("serve-bench", *line.split(), "--dry-run")
    assert printed, err
    file = tmp_path / "run.json"
    file.write_text(printed)
    backend = line.split()[:2] if "live" in line else []
    assert cli("serve-bench", *backend, "--config", file, "--dry-run")[1] == printed
    # flags still override
    other = cli("serve-bench", *backend, "--config", file, "--dry-run", "--seed", "7")[1]
    assert json.loads(other)["config"] == json.loads(printed)["config"] | {"seed": 7} | _nested(printed, seed=7)


def _nested(printed: str, **changes: Any) -> dict[str, Any]:
    workload = json.loads(printed)["config"].get("workload")
    return {} if workload is None else {"workload": workload | changes}


def test_a_printed_field_that_no_option_sets_is_refused_away_from_its_default(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    for part, status in (("test", 0), ("tune", 2)):
        file.write_text(json.dumps({"config": {"trace": str(TRACE), "max_requests": 2, "part": part}}))
        got, _, err = cli("serve-bench", "--config", file, "--dry-run")
        assert got == status, err
    assert "sets 'part'" in err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--backend live --lengths arrival", "--lengths belongs to --backend sim"),
        (
            "--backend live --home storage --container 2 --start 1",
            "--home, --container and --start belong to --backend",
        ),
        ("--backend live --copies timed", "--copies belongs to --backend sim"),
        ("--backend live --fail-gpu 1:0 --scale-to-zero", "--scale-to-zero and --fail-gpu belong to --backend sim"),
        ("--ranks 3 --no-predict", "--ranks and --no-predict belong to --backend live"),
    ],
)
def test_an_option_of_the_other_backend_is_refused_by_name(cli: Cli, given: str, words: str) -> None:
    status, out, err = cli("serve-bench", *given.split())
    assert (status, out) == (2, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_an_option_of_the_other_backend_may_be_at_its_default(cli: Cli) -> None:
    status, _, err = cli("serve-bench", "--trace", TRACE, "--max-requests", "2", "--ranks", "2", "--dry-run")
    assert status == 0, err


def test_a_configuration_file_may_give_one_value_of_a_repeated_option(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"trace: {TRACE}\npolicy: static\nfail_gpu: '1:0'\nmax-requests: 2\n")
    status, out, err = cli("serve-bench", "--config", tmp_path / "c.yaml", "--dry-run")
    assert status == 0, err
    assert json.loads(out)["config"]["policies"] == ["static"]


def test_parsing_needs_no_numerical_library() -> None:
    import subprocess
    import sys

    program = (
        "import sys, moeless.cli.serve_bench, moeless.cli.tune, moeless.cli.plan, moeless.cli.reproduce\n"
        "print([name for name in ('numpy', 'numba', 'torch', 'optuna') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
