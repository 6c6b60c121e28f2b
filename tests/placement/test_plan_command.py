"""``moeless plan``: a plan file from a trace of any kind, one sentence for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeless.contracts import ModelPlan

TRACES = Path(__file__).resolve().parents[1] / "fixtures" / "traces"


@pytest.mark.parametrize("kind", ["tokens", "iterations", "counts"])
def test_a_plan_from_each_kind_of_trace(cli, tmp_path, kind):
    out = tmp_path / "plan.json"
    status, stdout, stderr = cli("plan", TRACES / kind, "--planner", "eplb", "--out", out, "--tokens", 64, "--json")
    assert (status, stderr) == (0, "")
    plan = ModelPlan.from_json(json.loads(out.read_text()))
    assert json.loads(stdout)["extras"] == sum(layer.num_extra for layer in plan.layers) > 0
    assert plan.num_gpus == 8


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--planner", "greedy"], "no planner is called"),
        (["--cluster", "b200"], "no cluster is called"),
        (["--costs", "free"], "no cost model is called"),
        (["--planner", "moeless", "--param", "cv=1"], "has no parameter"),
        (["--planner", "moeless", "--param", "cv_threshold"], "name=value"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(cli, tmp_path, arguments, sentence):
    out = tmp_path / "plan.json"
    status, _, stderr = cli("plan", TRACES / "tokens", *arguments, "--out", out)
    assert status == 2
    assert sentence in stderr
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_trace_is_one_sentence(cli, tmp_path):
    status, _, stderr = cli("plan", tmp_path / "none", "--out", tmp_path / "plan.json")
    assert (status, stderr.count("\n")) == (2, 1)


def test_dry_run_writes_nothing(cli, tmp_path):
    out = tmp_path / "plan.json"
    status, stdout, _ = cli("plan", TRACES / "tokens", "--out", out, "--dry-run")
    assert status == 0
    assert json.loads(stdout)["plan"]["layers"] >= 1
    assert not out.exists()
