"""The command line speaks in sentences and exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moeless.cli.main import COMMANDS


def test_every_listed_command_shows_help_with_an_example(cli) -> None:
    for name in COMMANDS:
        status, out, _ = cli(name, "--help")
        assert status == 0
        assert f"moeless {name}" in out
        assert "Example" in out, name


def test_listing_commands_imports_no_heavy_library() -> None:
    program = (
        "import sys; sys.argv=['moeless','--help']\n"
        "from moeless.cli.main import run\n"
        "try: run()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch','transformers','wandb','pyarrow','matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    "arguments",
    [("nonsense",), ("models", "--nonsense"), ("models", "nonsense"), ("models", "--config", "missing.yaml")],
)
def test_a_wrong_request_is_one_sentence_and_status_2(cli, arguments: tuple[str, ...]) -> None:
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


def test_a_configuration_file_sets_options_and_flags_override(cli, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("json: true\n")
    status, out, _ = cli("models", "bundled", "--config", config)
    assert status == 0
    assert json.loads(out)["name"] == "bundled"
    config.write_text("colour: red\n")
    status, _, err = cli("models", "--config", config)
    assert status == 2
    assert "colour" in err
    config.write_text("- a\n")
    assert cli("models", "--config", config)[0] == 2


def test_no_arguments_show_the_commands(cli) -> None:
    status, out, _ = cli()
    assert status == 0
    assert "serve-bench" in out
