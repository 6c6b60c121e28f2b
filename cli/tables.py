"""Result cells as tables in the terminal."""

from __future__ import annotations

from typing import Any

from moeless.cli import common
from moeless.metrics import Cell, catalogue


def show_cells(cells: list[Cell]) -> None:
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
        common.show(common.table(title, columns, rows))
        for warning in dict.fromkeys(warning for cell in mine for warning in cell.warnings):
            who = [cell.policy for cell in mine if warning in cell.warnings]
            common.remarks.print(f"! {'all' if len(who) == len(mine) else ', '.join(who)}: {warning}")
