"""The committed document is the one that the committed record gives, and it names every claim of the paper."""

from __future__ import annotations

from pathlib import Path

from moeless.experiments.document import DOCUMENT, REFERENCE, render
from moeless.files import read_json

ROOT = Path(__file__).resolve().parents[2]


def test_the_document_is_generated_from_the_reference_run() -> None:
    record, facts = (read_json(ROOT / REFERENCE / name) for name in ("reproduction.json", "facts.json"))
    assert (ROOT / DOCUMENT).read_text() == render(record, facts)


def test_every_stated_figure_of_the_paper_has_a_row() -> None:
    text = (ROOT / DOCUMENT).read_text()
    for stated in (
        "−43.19 %",
        "−21.89 %",
        "−92.68 %",
        "−84.06 %",
        "−95.11 %",
        "+18 %",
        "< 0.2 ms",
        "< 5 min",
        "1.92 / 128.32",
    ):
        assert stated in text, stated
