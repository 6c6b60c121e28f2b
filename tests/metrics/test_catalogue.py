"""The catalogue of metrics: what it says is what tables and documents show."""

from __future__ import annotations

from pathlib import Path

from moeless.metrics import catalogue

ROOT = Path(__file__).parents[2]


def test_the_documents_list_every_metric_as_the_catalogue_does() -> None:
    assert catalogue.reference() in (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")


def test_keys_objectives_and_logged_names_are_unique() -> None:
    for names in (
        [metric.key for metric in catalogue.METRICS],
        [metric.objective for metric in catalogue.METRICS if metric.objective],
        [metric.logged for metric in catalogue.METRICS if metric.logged],
    ):
        assert len(set(names)) == len(names)


def test_the_terminals_columns_keep_their_order_whatever_is_added() -> None:
    expected = ["layer mean µs", "p99 µs", "vs static", "imbalance", "replicas", "warm", "TTFT ms", "TPOT ms"]
    expected += ["p99 E2E s", "paper GB·s", "vs static", "resident GB·s", "vs static", "GPU·s", "goodput/s"]
    assert [name for name in catalogue.headings("terminal") if name in expected] == expected
