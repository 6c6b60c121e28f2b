"""Preset files carry a policy's parameters from ``tune`` to ``serve-bench``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeless.contracts import Policy
from moeless.errors import UserError
from moeless.tuning import Preset, Tuning, apply_preset, load_preset
from moeless.tuning.presets import run_presets

PRESET = Preset("p", Policy.parse("moeless:history"), {"cv_threshold": 0.7}, {"extra_slots": 2, "keep_alive": 0.5})


def test_a_preset_survives_its_file(tmp_path: Path):
    PRESET.save(tmp_path / "p.json")
    assert load_preset(tmp_path / "p.json") == PRESET


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "plan"}, "is not a preset"),
        ({"format": 2}, "is not a preset"),
        ({"policy": "nobody"}, "no planner is called 'nobody'"),
        ({"planner_params": {"v": 1}}, "has no parameter 'v'"),
        ({"planner_params": {"cv_threshold": "big"}}, "must be a number"),
        ({"settings": {"gpus": 4}}, "a preset sets gpus; it may set extra_slots"),
        ({"settings": {"keep_alive": -1}}, "at least 0"),
        ({"settings": {"keep_alive": "soon"}}, "is none of SECONDS"),
        ({"settings": {"extra_slots": 1.5}}, "must be a whole number"),
        ({"settings": {"replan_seconds": "x"}}, "must be a number"),
        ({"settings": {"scale_to_zero": 1}}, "true or false"),
        ({"settings": None}, "is not a preset"),
    ],
)
def test_a_wrong_preset_gives_one_sentence(tmp_path: Path, change: dict[str, Any], sentence: str):
    PRESET.save(tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text()) | change
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=sentence):
        load_preset(tmp_path / "p.json")


def test_a_preset_changes_the_run_and_is_named_in_its_cell(tuning_for: Callable[..., Tuning]):
    bench = tuning_for().bench
    plain = bench.run_cell("roofline", PRESET.policy).cell
    (tuned,) = (done.cell for done in run_presets(bench, [PRESET]))
    assert tuned.policy == f"{plain.policy}@p"
    assert tuned.settings["cv_threshold"] == 0.7
    assert tuned.settings["extra_slots"] == 2
    assert tuned.layer.replicas != plain.layer.replicas
    assert apply_preset(bench, PRESET).config.planner_params == {"moeless": {"cv_threshold": 0.7}}
    assert bench.config.planner_params == {}


def test_a_preset_used_on_something_else_warns(tuning_for: Callable[..., Tuning]):
    tuned_on = {"costs": "paper", "cluster": "h100x8", "model": "small"}
    preset = Preset("p", PRESET.policy, {}, {}, {"tuned_on": tuned_on})
    (cell,) = (done.cell for done in run_presets(tuning_for().bench, [preset]))
    assert "preset p was tuned for costs paper" in cell.warnings


def test_tune_then_serve_bench_from_the_command_line(cli: Callable[..., Any], trace: Path, tmp_path: Path):
    common = ["--arrivals", "poisson:200", "--max-requests", "8", "--no-wandb", "--json"]
    status, out, err = cli(
        "tune", trace, "--policy", "moeless:history", "--trials", "3", "--storage", tmp_path / "s.journal",
        "--range", "cv_threshold=0.1:1", "--out", tmp_path / "run", *common,
    )  # fmt: skip
    assert status == 0, err
    assert json.loads(out)["points"][0]["name"] == "default"
    assert (tmp_path / "run" / "figures" / "tuning.svg").is_file()
    status, out, err = cli(
        "serve-bench", "--trace", trace, "--policy", "static", "--costs", "roofline",
        "--preset", tmp_path / "run" / "preset.json", "--out", tmp_path / "bench", *common,
    )  # fmt: skip
    assert status == 0, err
    assert [cell["policy"].rpartition("@")[2] for cell in json.loads(out)["cells"]] == ["static", "tuned"]


def test_a_wrong_request_leaves_nothing_behind(cli: Callable[..., Any], trace: Path, tmp_path: Path):
    for arguments, sentence in (
        (["--policy", "static"], "has nothing to tune"),
        (["--policy", "oracle"], "has nothing to tune"),
        (["--objective", "speed"], "no objective is called"),
        (["--range", "v=1:2"], "has no parameter 'v'"),
    ):
        status, _, err = cli(
            "tune", trace, *arguments, "--storage", tmp_path / "s.journal", "--out", tmp_path / "run", "--no-wandb"
        )
        assert status == 2
        assert sentence in err
        assert err.count("\n") == 1
    assert not any(tmp_path.iterdir())
