"""Comparing runs: the same numbers, side by side, with what differs between them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from moeless.metrics.result import Result
from moeless.report import compare
from moeless.tracking import start_run


@pytest.fixture
def runs(tmp_path: Path, result) -> list[Path]:
    """Two runs; every layer of the second takes half as long, with another rate and another seed."""
    made = []
    for number, factor in enumerate((1.0, 0.5)):
        cells = tuple(
            dataclasses.replace(cell, layer=dataclasses.replace(cell.layer, mean_ms=cell.layer.mean_ms * factor))
            for cell in result.cells
        )
        path = tmp_path / f"run{number}"
        with start_run(
            "serve-bench", f"run{number}", {"rate": number, "batching": "one"}, number, out=path, wandb=False
        ) as run:
            run.write_result(Result("x", cells))
        made.append(path)
    return made


def test_compare_shows_each_policy_of_each_run_and_its_change(runs, tmp_path: Path, cli) -> None:
    status, out, _ = cli("compare", *runs, "--out", tmp_path / "cmp", "--json")
    assert status == 0
    data = json.loads(out)
    static = [row for row in data["tables"][0]["rows"] if row["policy"] == "static"]
    assert [(row["run"], row["mean layer (ms)"], row["vs first run (%)"]) for row in static] == [
        ("run0", 2.0, None),
        ("run1", 1.0, -50.0),
    ]
    different = {row[0]: row[1:] for row in data["differences"]}
    assert different["config.rate"] == ["0", "1"]
    assert different["seed"] == ["0", "1"]
    assert "config.batching" not in different
    text = (tmp_path / "cmp" / "index.html").read_text()
    assert "different inputs" not in text
    assert "run1" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["run0"], "at least two"), (["run0", "run0"], "given twice"), (["run0", "none"], "does not exist")],
)
def test_wrong_requests_are_one_sentence(runs, tmp_path: Path, cli, arguments: list[str], sentence: str) -> None:
    status, _, err = cli("compare", *[tmp_path / name for name in arguments], "--out", tmp_path / "cmp")
    assert status == 2
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "cmp").exists()


def test_the_index_lists_every_run_and_links_to_its_page(runs, tmp_path: Path, cli) -> None:
    (runs[0] / "index.html").write_text("a page")
    status, _, _ = cli("compare", "--root", tmp_path)
    assert status == 0
    text = (tmp_path / "index.html").read_text()
    assert '<a href="run0/index.html">run0</a>' in text
    assert "run1" in text
    assert '<a href="run1' not in text


def test_a_damaged_run_does_not_hide_the_others(runs, tmp_path: Path) -> None:
    (runs[1] / "manifest.json").write_text("{")
    text = compare.write_index(tmp_path).read_text()
    assert "run0" in text
    assert "is not valid JSON" in text


@pytest.mark.parametrize("dark", [False, True])
def test_comparison_and_index_fit_a_phone(runs, tmp_path: Path, cli, browser, dark: bool) -> None:
    assert cli("compare", *runs, "--out", tmp_path / "cmp")[0] == 0
    for page in (tmp_path / "cmp" / "index.html", compare.write_index(tmp_path)):
        seen = browser(page, 390, dark)
        assert seen["overflow"] <= 0
        assert seen["beyond"] == []
        assert seen["broken"] == 0
        assert seen["console"] == []
