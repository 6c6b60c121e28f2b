"""Sections of a page made from a result: tables per cost model, figures, warnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeless.metrics import catalogue
from moeless.metrics.result import Cell, Result
from moeless.report import result_figures
from moeless.report.page import Figure, Section, Table, Text
from moeless.report.summary import baseline, groups
from moeless.tracking.run import Run, slug

COST_NOTES = {
    "paper": "The paper's linear costs: time proportional to tokens, the slowest replica counts, control is free.",
    "roofline": "Physical costs: an expert takes the longer of its arithmetic and its weight read, a GPU the sum over "
    "its replicas, and control is charged.",
    "measured": "Costs interpolated from a hardware profile.",
}


def result_sections(run: Run, result: Result, label: str = "") -> list[Section]:
    """One section per (model, cluster, cost model); figures are saved into the run folder.

    Args:
        label: shown on every figure, for example ``bundled model``.
    """
    found = groups(result)
    several = len({key[:2] for key in found}) > 1
    sections = []
    for (model, cluster, costs), cells in found.items():
        title = f"Latency and cost, {costs} costs" + (f": {model} on {cluster}" if several else "")
        blocks: list[Text | Table | Figure] = []
        if costs in COST_NOTES:
            blocks.append(Text(COST_NOTES[costs]))
        blocks += [layer_table(cells), billing_table(cells)]
        requests = request_table(cells)
        if requests is not None:
            blocks.append(requests)
        blocks += _figures(run, cells, slug(f"{costs}-{model}-{cluster}") if several else costs, label)
        sections.append(Section(title, blocks))
    return sections


def warnings(result: Result) -> list[str]:
    """Every cell's warnings once, with the policies they concern where these are not all."""
    owners: dict[str, list[str]] = {}
    for cell in result.cells:
        for warning in cell.warnings:
            owners.setdefault(warning, []).append(cell.policy)
    everyone = {cell.policy for cell in result.cells}
    return [
        text if set(policies) == everyone else f"{', '.join(dict.fromkeys(policies))}: {text}"
        for text, policies in owners.items()
    ]


def layer_table(cells: Sequence[Cell]) -> Table:
    """Layer latency, balance and copies, one row per policy."""
    table = _table("layer page", cells, "MoE-layer time over all iterations and layers")
    rows = [[*row, cell.evidence] for row, cell in zip(table.rows, cells, strict=True)]
    return Table([*table.columns, "evidence"], rows, table.caption)


def billing_table(cells: Sequence[Cell]) -> Table:
    """The three bills and their difference to static EP."""
    text = (
        "Three bills: an expert while its own layer runs (paper's rule), while it is in memory, and whole GPUs while "
        "they are held"
    )
    return _table("billing page", cells, text)


def request_table(cells: Sequence[Cell]) -> Table | None:
    """Request latency under the names of vLLM's benchmark; None where no cell has it."""
    if all(cell.request is None for cell in cells):
        return None
    return _table("request page", cells, "Request latency")


def _table(view: catalogue.View, cells: Sequence[Cell], text: str) -> Table:
    rows: list[list[Any]] = []
    for name, cell in zip(result_figures.names(cells), cells, strict=True):
        static = baseline(cells, cell)
        rows.append([name, *catalogue.values(view, cell, None if static is cell else static)])
    return Table(["policy", *catalogue.headings(view)], rows, _caption(cells, text))


def _figures(run: Run, cells: Sequence[Cell], stem: str, label: str) -> list[Figure]:
    evidence = cells[0].evidence
    made = []
    drawings: list[tuple[str, Any, str, bool]] = []
    if any(cell.layer.parts_ms for cell in cells):
        text = "Where a MoE layer's time goes, by policy; shorter is better."
        drawings.append(("parts", result_figures.layer_time_parts(cells), text, False))
    if any(cell.layer.cdf_ms for cell in cells):
        text = "Distribution of MoE-layer time; further left is better."
        drawings.append(("cdf", result_figures.layer_time_cdf(cells), text, False))
    text = "The same work billed by three rules; a saving under one rule can vanish under another."
    drawings.append(("bills", result_figures.bills(cells), text, True))
    for name, figure, caption, wide in drawings:
        full = f"{caption}{_lossy_note(cells)}"
        path = run.figure(f"{name}-{stem}", figure, caption=full)
        made.append(Figure(path, full, evidence, label, wide))
    return made


def _caption(cells: Sequence[Cell], text: str) -> str:
    return f"{text}.{_lossy_note(cells)}"


def _lossy_note(cells: Sequence[Cell]) -> str:
    return " † changes the model's outputs; a yardstick, not a policy." if any(cell.lossy for cell in cells) else ""
