"""``moeless reproduce``: figures with their data, claims with their kinds, requests refused in a sentence."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from moeless.experiments.base import Options
from moeless.experiments.catalogue import NAMES, PAPER, find
from moeless.experiments.tables import gate_bytes, scratch_bytes
from moeless.spec import preset


def test_every_figure_and_table_is_in_the_catalogue_under_its_own_name() -> None:
    for name in NAMES:
        (experiment,) = find(name)
        assert experiment.name == name
        assert experiment.question.endswith("?")
        assert experiment.stated or name not in PAPER
    assert len(find("all")) == len(NAMES)


def test_every_job_names_a_function_that_exists() -> None:
    import importlib

    from moeless.experiments.runner import closure

    for name in NAMES:
        for job in closure(find(name)[0].jobs(Options()).values()).values():
            module, _, function = job.function.partition(":")
            assert callable(getattr(importlib.import_module(module), function)), job.label


def test_the_papers_predictor_memory_follows_from_shapes_with_its_own_rounding() -> None:
    """Per layer in MiB rounded to two decimals, times the layers that the paper counts."""
    for name, layers, gates, scratch in (
        ("mixtral-8x7b", 32, 1.92, 128.32),
        ("phi-3.5-moe", 32, 4.16, 128.64),
        ("llama-4-scout", 24, 3.84, 120.48),
    ):
        spec = preset(name)
        # half a hundredth is rounded to even in the first row and up in the second, as in the paper
        per_gate = gate_bytes(spec) / 2**20
        assert abs(per_gate * layers - gates) / layers <= 0.0051
        assert round(scratch_bytes(spec) / 2**20, 2) * layers == pytest.approx(scratch)


def test_tables_leave_claims_data_and_a_page(tmp_path: Path, cli) -> None:
    status, out, _ = cli(
        "reproduce", "table2", "--out", tmp_path / "run", "--cache", tmp_path / "cache", "--no-wandb", "--json"
    )
    assert status == 0
    (entry,) = json.loads(out)["experiments"]
    assert {claim["kind"] for claim in entry["claims"]} == {"derived"}
    assert all(claim["command"] == "moeless reproduce table2" for claim in entry["claims"])
    rows = list(csv.DictReader((tmp_path / "run" / "data" / "table2-memory.csv").open()))
    assert [row["model"] for row in rows if row["evidence"] == "stated"] == [
        "mixtral-8x7b",
        "phi-3.5-moe",
        "llama-4-scout",
    ]
    assert (tmp_path / "run" / "index.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["fig99"], "no experiment is called 'fig99'"),
        (["table1", "--model", "gpt-9"], "gpt-9"),
        (["table1", "--cluster", "tpu"], "no cluster is called"),
        (["table1", "--costs", "free"], "free"),
        (["table1", "--billing", "mine"], "--billing is 'mine'"),
        (["fig1", "--trace", "nowhere"], "nowhere"),
        (["fig1", "--beside"], "name one with --trace"),
        (["fig8", "--live", "nowhere"], "holds no result.json"),
    ],
)
def test_wrong_requests_are_one_sentence_and_leave_nothing(
    tmp_path: Path, cli, arguments: list[str], sentence: str
) -> None:
    status, _, err = cli(
        "reproduce", *arguments, "--out", tmp_path / "run", "--cache", tmp_path / "cache", "--no-wandb"
    )
    assert status == 2
    assert sentence in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_synthetic_routing_is_labelled_and_repeatable(tmp_path: Path) -> None:
    from moeless.experiments.cells import synthetic
    from moeless.traces import open_trace

    params = {
        "model": "mixtral-8x7b",
        "dataset": "lmsys",
        "requests": 3,
        "prompt_tokens": 12,
        "output_tokens": 4,
        "seed": 0,
    }
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        synthetic.trace(params, [], tmp_path / name)
    trace = open_trace(tmp_path / "a")
    assert trace.info.synthetic
    assert (trace.load_topk() == open_trace(tmp_path / "b").load_topk()).all()
