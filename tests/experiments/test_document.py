"""The committed document is the one that the committed record gives, and it names every claim of the paper."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeless.errors import UserError
from moeless.experiments import document
from moeless.experiments.document import DOCUMENT, REFERENCE, render
from moeless.experiments.explanations import paragraphs
from moeless.experiments.statements import Claim, Measured, Stated, claim_record, read_claims
from moeless.files import read_json, write_json

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


def _said(change: float) -> str:
    ours = {
        side: Measured({"a": change - 5, "b": change + 5}, "%", "layer.mean_ms", costs)
        for side, costs in (("paper_rules", "paper"), ("physical", "roofline"))
    }
    statements = {
        "layer-time-static": "Mean MoE-layer time of MoEless against Megatron-LM",
        "cost-static-paper": "Cost of MoEless against Megatron-LM, one rule for all",
        "cost-static-paper_whole": "Cost of MoEless against Megatron-LM, baseline billed for all layers",
    }
    claims = [
        Claim(name, text, "Megatron-LM", Stated((-43.19,), "%"), ours, "lower", "synthetic", "moeless reproduce fig8")
        for name, text in statements.items()
    ]
    entry = {"claims": [claim_record(claim) for claim in claims], "findings": [], "figures": [], "study": False}
    return " ".join(paragraphs({"experiments": [entry]}))


def test_what_the_document_says_of_time_and_cost_follows_from_the_runs_numbers() -> None:
    falls, rises, nothing = _said(-41.0), _said(7.5), _said(0.4)
    assert "are shorter with its copies" in falls
    assert "MoEless is cheaper" in falls
    assert "are longer with its copies" in rises
    assert "MoEless is dearer" in rises
    assert "as long, within 1 %," in nothing
    assert "−41.0 % (−46.0 to −36.0) under its rules" in falls
    assert "its rules: agrees 3; physical: agrees 3" in falls
    assert "(verdict: its rules: opposite; physical: opposite)" in rises


def test_a_claims_numbers_survive_the_record() -> None:
    record = read_json(ROOT / REFERENCE / "reproduction.json")
    claims = {claim.id: claim for claim in read_claims(record)}
    kept = [claim for entry in record["experiments"] for claim in entry["claims"]]
    assert len(claims) == len(kept)
    assert [claim_record(claim) for claim in claims.values()] == kept
    assert claims["layer-time-static"].stated == Stated((-43.19,), "%")


def test_a_run_of_an_older_version_is_refused_and_leaves_the_reference_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"experiments": [{"claims": [{"statement": "a", "paper": "−43.19 %"}], "findings": []}]}
    write_json(tmp_path / "run" / "reproduction.json", record)
    write_json(tmp_path / "run" / "manifest.json", {})
    monkeypatch.setattr(document, "REFERENCE", tmp_path / "reference")
    with pytest.raises(UserError, match="older version of moeless"):
        document.main([str(tmp_path / "run")])
    assert not (tmp_path / "reference").exists()
