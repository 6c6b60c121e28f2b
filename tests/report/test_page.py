"""The page is one file that opens anywhere and says on what evidence everything stands."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from moeless.report import charts, page
from moeless.report.result_page import result_sections, summarise, warnings
from moeless.tracking import start_run

VOID = {"meta", "link", "img", "br", "hr", "input", "path", "use"}


class Checker(HTMLParser):
    """Collects ids and finds tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, result) -> Path:
    tmp_path = tmp_path_factory.mktemp("page")
    with start_run("demo", "x", {"seed": 1}, 1, out=tmp_path / "run", wandb=False) as run:
        run.warn("only 12 requests: tail percentiles are single observations")
        load = np.random.default_rng(0).integers(1, 500, (8, 16))
        first = run.figure("popularity", charts.popularity(load))
        second = run.figure("bars", charts.expert_bars({"layer 0": load[0]}, "Load"))
        sections = [
            page.Section("Routing", [page.Figure(first, "Where tokens go.", "measured"), page.Figure(second, "Bars.")]),
            *result_sections(run, result),
        ]
        page.write(
            run.path,
            "A demo",
            summarise(result),
            sections,
            manifest=run.snapshot(),
            warnings=warnings(result),
            label="bundled model",
        )
    return tmp_path / "run" / "index.html"


def test_the_page_needs_no_network(written: Path) -> None:
    text = written.read_text()
    outside = re.findall(r'(?:src|href)="(?!#|data:)([^"]*)"|url\((?!#)([^)]*)\)|@import', text)
    assert outside == []
    assert "<script" not in text


def test_the_page_is_well_formed_with_unique_ids(written: Path) -> None:
    checker = Checker()
    checker.feed(written.read_text())
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))


def test_every_reference_inside_a_figure_resolves(written: Path) -> None:
    text = written.read_text()
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    used = set(re.findall(r'xlink:href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert used
    assert used <= ids


def test_every_figure_carries_the_bundled_model_label_and_its_evidence_is_explained(written: Path) -> None:
    text = written.read_text()
    captions = re.findall(r"<figcaption>.*?</figcaption>", text, re.DOTALL)
    assert len(captions) == 8
    assert all("bundled model" in caption for caption in captions)
    assert "really ran on this machine" in text
    assert "computed from recorded, real routing" in text
    assert "made-up routing" not in text


def test_warnings_and_the_whole_manifest_are_on_the_page(written: Path) -> None:
    text = written.read_text()
    assert "tail percentiles are single observations" in text
    assert "command_line" in text
    assert "Where this comes from" in text


def test_many_remarks_are_folded_so_that_results_stay_in_sight() -> None:
    few, many = (page.render("x", "y", [], warnings=[f"remark {i}" for i in range(count)]) for count in (3, 9))
    assert "<details>" not in few
    assert "<summary>9 remarks on validity</summary>" in many
    assert all(f"<li>remark {i}</li>" in many for i in range(9))


def test_figures_follow_the_page_colours(written: Path) -> None:
    svg = re.search(r"<svg.*?</svg>", written.read_text(), re.DOTALL)[0]
    assert "currentColor" in svg
    assert "#1a1b1c" not in svg
    assert "var(--grid)" in svg or "imshow" in svg or "image" in svg


def test_text_from_outside_cannot_become_markup() -> None:
    sections = [page.Section("<b>x</b>", [page.Table(["<i>"], [["<script>alert(1)</script>"]]), page.Text("<img>")])]
    text = page.render("<title>", "<script>", sections, warnings=["<svg>"])
    assert "<script>" not in text
    assert "<img>" not in text
    assert "<i>" not in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (12345.6, "12,346"),
        (1e-5, "1.000e-05"),
    ],
)
def test_numbers_are_shown_to_four_digits(value: object, shown: str) -> None:
    assert page.cell_text(value) == shown


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1200, True)])
def test_the_page_fits_its_screen_in_a_browser(written: Path, browser, width: int, dark: bool) -> None:
    seen = browser(written, width, dark)
    assert seen["title"] == "A demo"
    assert seen["overflow"] <= 0
    assert seen["beyond"] == []
    assert seen["broken"] == 0
    assert seen["drawn"] == 8
    assert seen["console"] == []
    ground, ink = (_brightness(seen[name]) for name in ("ground", "ink"))
    assert (ground < 0.2 < 0.8 < ink) if dark else (ink < 0.2 < 0.8 < ground)


def _brightness(colour: str) -> float:
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return (0.21 * red + 0.72 * green + 0.07 * blue) / 255


def test_the_page_prints(written: Path, printer) -> None:
    pdf = printer(written)
    assert pdf[:5] == b"%PDF-"
    pages = [int(count) for count in re.findall(rb"/Count (\d+)", pdf)]
    # its sections, eight figures and the whole manifest
    assert 3 <= max(pages) <= 12
