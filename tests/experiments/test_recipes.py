"""The commands for the real thing are accepted here, and end in a sentence where the weights would be needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeless.experiments.document import DOCUMENT
from moeless.experiments.recipes import LIVE, MODELS, PROMPTS, paper_model, recipes

ROOT = Path(__file__).resolve().parents[2]

MISSING = {
    # command to what its sentence names on a machine without hub, weights and GPUs
    "trace": ("without access to the hub",),
    "train-predictor": ("traces/",),
    "serve-bench": ("GPUs", "there is no model"),
    "reproduce": ("traces/",),
}


@pytest.mark.parametrize("model", MODELS)
def test_every_command_ends_in_one_sentence_that_says_what_is_missing(
    model: str, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for arguments in paper_model(model).arguments():
        status, _, err = cli(*arguments)
        assert status == 2, arguments
        assert any(words in err for words in MISSING[arguments[0]]), arguments
        assert err.strip().count("\n") == 0, err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_the_engine_serves_is_also_run_live() -> None:
    for model in MODELS:
        commands = paper_model(model).commands
        assert any("--backend live" in command for command in commands) == (model in LIVE)
        assert sum(command.startswith("moeless trace") for command in commands) == len(PROMPTS)
        assert ("--live" in commands[-1]) == (model in LIVE)


def test_every_recipe_is_in_the_document() -> None:
    text = " ".join((ROOT / DOCUMENT).read_text().replace("\\\n", " ").split())
    for recipe in recipes():
        for command in recipe.commands:
            assert command in text
