"""The committed document is the one that the committed record gives, and it names every claim of the paper."""

from __future__ import annotations

from pathlib import Path

from moeless.experiments.document import DOCUMENT, REFERENCE, render
from moeless.experiments.why import mean_of, paragraphs
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
        "+15 %",
        "< 0.2 ms",
        "< 5 min",
        "1.92 / 128.32",
    ):
        assert stated in text, stated


def test_what_the_document_says_of_time_and_cost_follows_from_the_runs_figures() -> None:
    def said(change: str) -> str:
        claim = {
            "paper": "−43.19 %",
            "paper_rules": change,
            "physical": change,
            "live": None,
            "verdict": "its rules: agrees; physical: opposite",
        }
        statements = (
            "Mean MoE-layer time of MoEless against Megatron-LM",
            "Cost of MoEless against Megatron-LM, one rule for all",
            "Cost of MoEless against Megatron-LM, baseline billed for all layers",
        )
        entry = {"claims": [{"statement": text, **claim} for text in statements], "findings": [], "figures": []}
        return " ".join(paragraphs({"experiments": [{**entry, "study": False}]}))

    falls, rises, nothing = said("−20.0 % (−30.0 to +1.0)"), said("+7.5 %"), said("+0.4 %")
    assert "are shorter with its copies" in falls
    assert "MoEless is cheaper" in falls
    assert "are longer with its copies" in rises
    assert "MoEless is dearer" in rises
    assert "as long, within 1 %," in nothing
    assert "its rules: agrees 3; physical: opposite 3" in falls
    assert "(verdict: its rules: agrees; physical: opposite)" in falls
    assert mean_of("−0.1 % (−0.2 to −0.0)") == -0.1
    assert mean_of(None) is None
