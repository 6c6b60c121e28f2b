"""The page that says how to add a predictor: its example, installed as a package's entry point, works everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from moeless.contracts import Context, Phase, Policy
from moeless.policy.predictors import FittedPredictors
from moeless.predictors import PREDICTORS, load_predictor
from moeless.spec import preset

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending" / "predictor.md"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's two blocks as an installed package: the module, and the metadata that an installer writes of it."""
    module, project = re.findall(r"```(?:python|toml)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    group, point = re.search(r'entry-points\."(.+?)"\]\n(.+)', project).groups()
    site = tmp_path / "site"
    (site / "halves-1.0.dist-info").mkdir(parents=True)
    (site / "halves.py").write_text(module)
    (site / "halves-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1.0\n")
    (site / "halves-1.0.dist-info" / "entry_points.txt").write_text(f"[{group}]\n{point.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(PREDICTORS, "_loaded", dict(PREDICTORS._loaded))


def test_the_example_forecasts_what_it_says(installed: None) -> None:
    spec = preset("bundled")
    predictor = FittedPredictors(spec, ()).get("halves", Policy.parse("eplb:halves:1"))
    history_E, last_E = np.arange(1.0, spec.E + 1), np.arange(spec.E, 0, -1)
    mean_E = predictor.predict(Context(None, None, history_E, last_E, 40, Phase.DECODE), 0, 1).mean_E
    expected_E = 0.5 * history_E / history_E.sum() + 0.5 * last_E / last_E.sum()
    assert mean_E == pytest.approx(expected_E * 40 * spec.K)
    assert predictor.predict(Context(None, None, history_E, None, 40, Phase.DECODE), 0, 1).source == "history"


def test_the_example_is_a_method_of_the_commands(installed: None, cli, made, tmp_path: Path) -> None:
    assert "halves" in PREDICTORS.names()
    status, _, error = cli("train-predictor", made.path, "--method", "halves", "--evaluate", "--out", tmp_path / "p")
    assert status == 0, error
    assert load_predictor(tmp_path / "p").name == "halves"
    assert (tmp_path / "p" / "metrics.json").exists()
    status, _, error = cli("train-predictor", made.path, "--method=halves", "--param=a=1", "--out", tmp_path / "q")
    assert status == 2
    assert "'halves' has no parameters" in error
