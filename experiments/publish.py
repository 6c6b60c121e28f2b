"""From drawn experiments to files: figures, CSV, claims, one page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moeless.experiments.base import Claim, Data, Drawn, Experiment, Options
from moeless.files import write_json, write_text
from moeless.report import page
from moeless.tracking.run import Run

#: What the page and ``docs/reproduction.md`` are made from.
RECORD = "reproduction.json"
CLAIM_COLUMNS = ("claim", "paper", "ours, its rules", "ours, physical", "live", "evidence", "note", "command")


def csv_text(data: Data) -> str:
    """The table as CSV; numbers in full, so that the figure can be drawn again from it."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(data.columns)
    writer.writerows([["" if cell is None else cell for cell in row] for row in data.rows])
    return buffer.getvalue()


def claim_rows(claims: Sequence[Claim]) -> list[list[Any]]:
    """Claims as rows of CLAIM_COLUMNS."""
    return [
        [c.statement, c.paper, c.paper_rules, c.physical, c.live, c.kind, c.note or None, f"`{c.command}`"]
        for c in claims
    ]


class Publisher:
    """Collects experiments as they finish and writes each one's files at once."""

    def __init__(self, run: Run, options: Options) -> None:
        self.run = run
        self.options = options
        self.record: list[dict[str, Any]] = []
        self._sections: list[page.Section] = []
        self._claims: list[Claim] = []

    def add(self, experiment: Experiment, drawn: Drawn, seconds: float, counts: Mapping[str, int]) -> None:
        """Write an experiment's figures and tables; remember its claims."""
        blocks: list[page.Text | page.Table | page.Figure] = [
            page.Text(f"**Question.** {experiment.question}"),
            page.Text(f"**The paper.** {experiment.stated}"),
            *map(page.Text, drawn.text),
        ]
        figures = []
        for name, plot in drawn.plots.items():
            full = experiment.name if name == "main" else f"{experiment.name}-{name}"
            path = self.run.figure(full, plot.figure, experiment.title, plot.caption, ("svg", "png", "pdf"))
            blocks.append(page.Figure(path, plot.caption, plot.kind, plot.label, plot.wide))
            figures.append({"name": full, "caption": plot.caption, "kind": plot.kind, "label": plot.label})
        tables = []
        for name, data in drawn.data.items():
            path = self.run.path / "data" / f"{experiment.name}-{name}.csv"
            write_text(path, csv_text(data))
            tables.append({"name": path.stem, "caption": data.caption, "rows": len(data.rows)})
            if data.show:
                blocks.append(page.Table(data.columns, data.rows, f"{data.caption}." if data.caption else ""))
        for warning in drawn.warnings:
            self.run.warn(f"{experiment.title}: {warning}")
        self._sections.append(page.Section(experiment.title, blocks))
        self._claims += drawn.claims
        self.record.append(
            {
                "name": experiment.name,
                "title": experiment.title,
                "question": experiment.question,
                "stated": experiment.stated,
                "text": list(drawn.text),
                "figures": figures,
                "tables": tables,
                "shown": {
                    name: {
                        "columns": list(data.columns),
                        "rows": [list(row) for row in data.rows],
                        "caption": data.caption,
                    }
                    for name, data in drawn.data.items()
                    if data.show
                },
                "claims": [asdict(claim) for claim in drawn.claims],
                "warnings": list(drawn.warnings),
                "seconds": round(seconds, 2),
                "jobs": dict(counts),
            }
        )
        self.run.log({"experiment": experiment.name, "seconds_taken": round(seconds, 3), **counts})

    def finish(self) -> Path:
        """Write the record, the claims and the page; returns the page's path."""
        write_json(self.run.path / RECORD, {"format": 1, "full": self.options.full, "experiments": self.record})
        sections = list(self._sections)
        if self._claims:
            table = page.Table(
                CLAIM_COLUMNS,
                claim_rows(self._claims),
                "What the paper states beside ours: under its own rules (linear costs, own-layer billing), under "
                "physical costs, and live.",
            )
            sections.insert(0, page.Section("Claims", [table]))
            data = Data(CLAIM_COLUMNS, claim_rows(self._claims))
            write_text(self.run.path / "data" / "claims.csv", csv_text(data))
        return page.write(self.run.path, self._title(), self._summary(), sections, manifest=self.run.snapshot())

    def _title(self) -> str:
        only = self.record[0]["title"] if len(self.record) == 1 else "The paper, figure by figure"
        return f"MoEless reproduced: {only}"

    def _summary(self) -> list[str]:
        figures = sum(len(entry["figures"]) for entry in self.record)
        size = "full" if self.options.full else "quick"
        kinds: dict[str, int] = {}
        for claim in self._claims:
            kinds[claim.kind] = kinds.get(claim.kind, 0) + 1
        computed = sum(entry["jobs"].get("computed", 0) for entry in self.record)
        cached = sum(entry["jobs"].get("cached", 0) for entry in self.record)
        plural = "experiments" if len(self.record) != 1 else "experiment"
        first = f"{len(self.record)} {plural} of arXiv 2603.06350 at {size} size gave {figures} figures"
        second = f"{computed} results were computed and {cached} came from the cache"
        if not self._claims:
            return [f"{first}.", f"{second}."]
        marks = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        third = f"{len(self._claims)} of the paper's claims stand beside ours ({marks}), with the command behind each"
        return [f"{first}.", f"{second}.", f"{third}."]
