"""Result cells as tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from moeless.cli import common
from moeless.metrics import Cell, catalogue


def cell_tables(cells: Sequence[Cell]) -> Iterator[Table | str]:
    """One table per cluster, cost model and request rate, and the cells' warnings below it."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.cluster, cell.costs, cell.settings.get("request_rate")), []).append(cell)
    columns = ["policy", *catalogue.headings("terminal")]
    for (cluster, costs, rate), mine in groups.items():
        base = next((cell for cell in mine if cell.policy == "static"), None)
        runs = f"{mine[0].evidence}, {mine[0].layer.samples:,} layer runs"
        at = f" at {rate:g} requests/s" if rate else ""
        title = f"{mine[0].model} on {cluster}{at}, {costs} costs ({runs})"
        rows = [
            [cell.policy + (" (lossy)" if cell.lossy else ""), *catalogue.texts("terminal", cell, base)]
            for cell in mine
        ]
        yield common.table(title, columns, rows)
        for warning in dict.fromkeys(warning for cell in mine for warning in cell.warnings):
            who = [cell.policy for cell in mine if warning in cell.warnings]
            yield f"! {'all' if len(who) == len(mine) else ', '.join(who)}: {warning}"


def verification_table(cells: Sequence[Cell]) -> Iterator[Table]:
    """What was verified, and what the prompts' perplexity was under each policy; nothing where nothing was measured."""
    rows = []
    for cell in cells:
        if cell.evidence != "measured":
            continue
        entry = cell.settings.get("verification") or {}
        copies = cell.settings["copies"]
        verdict = ("yes" if entry["passed"] else "NO") if entry else "not asked"
        rows.append(
            [
                cell.policy + (" (lossy)" if cell.lossy else ""),
                "lossy by design" if cell.lossy else verdict,
                f"{entry['identical']:,} / {entry['tokens']:,}" if entry else None,
                f"{entry['near_ties']}" if entry else None,
                f"{entry['max_difference']:.1e}" if entry else None,
                cell.settings["prompt_perplexity"],
                f"{cell.layer.parts_ms['expert']:.3f}",
                f"{cell.layer.parts_ms['control']:.3f}",
                f"{copies['loads']:,} ({copies['peer_loads']:,})",
                f"{cell.layer.moved_bytes / 1e6:,.1f}",
            ]
        )
    columns = ["policy", "verified", "identical tokens", "near ties", "max logit diff", "prompt perplexity"]
    columns += ["expert ms", "control ms", "copies made (from peers)", "moved MB"]
    if rows:
        yield common.table("Outputs against the unmodified model, and copies", columns, rows)


def prediction_table(cells: Sequence[Cell]) -> Iterator[Table]:
    """The simulator's figures for the same requests, routing and policies, beside what was measured."""
    live = [cell for cell in cells if cell.evidence == "measured"]
    simulated = [cell for cell in cells if cell.evidence != "measured"]
    if not live or len(live) != len(simulated):
        return
    rows = []
    for real, said in zip(live, simulated, strict=True):
        pairs = [(real.layer.parts_ms[name], said.layer.parts_ms[name]) for name in ("expert", "all_to_all", "control")]
        rows.append(
            [
                real.policy,
                *(f"{1e3 * measured:.0f} / {1e3 * predicted:.0f}" for measured, predicted in pairs),
                f"{1e3 * real.layer.mean_ms:.0f} / {1e3 * said.layer.mean_ms:.0f}",
                " / ".join(
                    f"{cell.layer.mean_ms / first.layer.mean_ms:.2f}"
                    for cell, first in ((real, live[0]), (said, simulated[0]))
                ),
                f"{real.layer.imbalance:.2f} / {said.layer.imbalance:.2f}",
                f"{real.layer.replicas:.1f} / {said.layer.replicas:.1f}",
            ]
        )
    columns = ["policy", "expert µs", "exchange µs", "control µs", "layer µs", "vs first", "imbalance", "replicas"]
    title = f"Measured / simulated with {simulated[0].costs} costs, same requests and routing"
    yield common.table(title, columns, rows)
