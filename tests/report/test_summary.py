"""The summary's numbers are the result's, and a lossy policy never wins."""

from __future__ import annotations

import dataclasses

import pytest

from moeless.metrics.result import Result
from moeless.report.result_page import baseline, billing_table, groups, layer_table, summarise, warnings


def test_three_sentences_name_the_fastest_exact_policy_and_its_saving(result) -> None:
    sentences = summarise(result)
    assert len(sentences) == 3
    assert sentences[0].startswith("4 policies served the same work of gpt-oss-20b on h100x8")
    assert "**moeless:layer_aware:1** had the lowest mean MoE-layer time, 1 ms, 50.0 % below static EP" in sentences[1]
    assert "oracle" not in sentences[1]
    assert "50.0 % below static EP by the paper's rule" in sentences[2]
    assert "the same as static EP by whole GPUs" in sentences[2]


def test_no_gain_is_said_plainly(result) -> None:
    slow = [
        dataclasses.replace(cell, layer=dataclasses.replace(cell.layer, mean_ms=9.0))
        if cell.policy != "static"
        else cell
        for cell in result.cells
        if cell.costs == "paper"
    ]
    assert "no policy was faster than static EP" in summarise(Result("x", tuple(slow)))[1].lower().replace("ep", "EP")


def test_a_result_without_static_or_without_cells_still_reads(result) -> None:
    only = tuple(cell for cell in result.cells if cell.policy == "oracle")
    assert all(summarise(Result("x", only))[:1])
    assert summarise(Result("x", ())) == ["The run ended without a result."]


def test_cells_are_compared_with_static_of_their_own_settings(result) -> None:
    static = next(cell for cell in result.cells if cell.policy == "static")
    fast = dataclasses.replace(static, settings={"rate": 2})
    slow = dataclasses.replace(static, settings={"rate": 9})
    mine = dataclasses.replace(static, policy="eplb", settings={"rate": 9})
    assert baseline([fast, slow, mine], mine) is slow


def test_cost_models_are_never_compared_with_each_other(result) -> None:
    assert [key[2] for key in groups(result)] == ["paper", "roofline"]


def test_tables_show_differences_to_static_in_per_cent(result) -> None:
    cells = groups(result)["gpt-oss-20b", "h100x8", "paper"]
    layers = {row[0]: row[2] for row in layer_table(cells).rows}
    assert layers == {"static": None, "eplb:history": -25.0, "moeless:layer_aware:1": -50.0, "oracle †": -75.0}
    bills = {row[0]: row[2] for row in billing_table(cells).rows}
    assert bills["moeless:layer_aware:1"] == pytest.approx(-50.0)
    assert "changes the model's outputs" in layer_table(cells).caption


def test_a_warning_names_the_policies_it_concerns(result) -> None:
    cells = [dataclasses.replace(cell, warnings=("few samples",)) for cell in result.cells]
    assert warnings(Result("x", tuple(cells))) == ["few samples"]
    cells[1] = dataclasses.replace(cells[1], warnings=("few samples", "saturated"))
    assert warnings(Result("x", tuple(cells)))[1] == "eplb:history: saturated"
