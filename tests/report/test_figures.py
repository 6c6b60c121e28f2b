"""Figures draw the numbers they are given, in colours that mean the same everywhere."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from moeless.report import charts, result_page, style


def test_a_policy_has_one_colour_whatever_it_is_drawn_with() -> None:
    alone = style.looks(["moeless:layer_aware:1"])["moeless:layer_aware:1"]
    crowd = style.looks(["static", "moeless:history:1", "moeless:layer_aware:1", "mine"])
    assert crowd["moeless:layer_aware:1"].colour == alone.colour
    assert crowd["moeless:history:1"].line != crowd["moeless:layer_aware:1"].line
    assert crowd["mine"].colour not in {crowd["static"].colour, alone.colour}


# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_systems_of_the_paper_stay_apart_for_colour_blind_readers(kind: str) -> None:
    def seen(colour: str) -> np.ndarray:
        srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        return np.clip(np.array(BLINDNESS[kind]) @ linear, 0, 1) ** (1 / 2.2)

    colours = [
        style.POLICY_COLOURS[name] for name in ("static", "eplb", "moeless", "elastic", "elastic-ahead", "oracle")
    ]
    for one, other in itertools.combinations(colours, 2):
        assert np.linalg.norm(seen(one) - seen(other)) > 0.1, (one, other)


def test_popularity_shows_load_over_an_even_share() -> None:
    figure = charts.popularity([[3, 1], [0, 0]])
    assert figure.axes[0].images[0].get_array().tolist() == [[1.5, 0.5], [0.0, 0.0]]
    assert "n = 4" in figure.axes[0].get_xlabel()


def test_stacked_parts_sum_to_the_mean_layer_time(result) -> None:
    cells = [cell for cell in result.cells if cell.costs == "paper"]
    axes = result_page.layer_time_parts(cells).axes[0]
    ends = {}
    for bar in axes.patches:
        ends[bar.get_y()] = max(ends.get(bar.get_y(), 0.0), bar.get_x() + bar.get_width())
    assert sorted(ends.values()) == pytest.approx(sorted(cell.layer.mean_ms for cell in cells))
    assert axes.get_xlabel() == "mean time of one MoE layer (ms)"


def test_fast_layers_are_shown_in_microseconds(result) -> None:
    static = result.cells[0]
    layer = dataclasses.replace(static.layer, mean_ms=0.25, parts_ms={"expert": 0.25})
    axes = result_page.layer_time_parts([dataclasses.replace(static, layer=layer)]).axes[0]
    assert "µs" in axes.get_xlabel()


def test_the_distribution_draws_every_policy_that_kept_it(result) -> None:
    cells = [cell for cell in result.cells if cell.costs == "roofline"]
    axes = result_page.layer_time_cdf(cells).axes[0]
    assert [line.get_label() for line in axes.lines] == result_page.names(cells)
    assert axes.lines[0].get_xdata()[-1] == pytest.approx(6.0)


def test_each_billing_rule_has_its_panel_and_unit(result) -> None:
    cells = [cell for cell in result.cells if cell.costs == "paper"]
    figure = result_page.bills(cells)
    assert [axes.get_xlabel() for axes in figure.axes] == list(result_page.BILLS.values())
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == [cell.billing.paper for cell in cells]


def test_a_band_spans_low_to_high() -> None:
    line = charts.Line([0, 1], [0.5, 0.6], [0.4, 0.5], [0.6, 0.8])
    figure = charts.lines({"a": line}, xlabel="d", ylabel="recall", title="t")
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.4)
    assert band[:, 1].max() == pytest.approx(0.8)


def test_small_multiples_share_one_legend() -> None:
    line = charts.Line([0, 1], [0, 1])
    grid = {"m1": {"static": line, "eplb": line}, "m2": {"static": line}}
    figure = charts.panels(grid, xlabel="x", ylabel="y", title="t", policies=True)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["static", "eplb"]
