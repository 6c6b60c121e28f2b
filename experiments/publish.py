"""From drawn experiments to files: figures, CSV, claims, one page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moeless.experiments.base import Data, Drawn, Experiment, Options
from moeless.experiments.catalogue import STUDIES
from moeless.experiments.statements import claim_record, finding_record, finding_text
from moeless.files import write_json, write_text
from moeless.report import page
from moeless.tracking.run import Run, save_figure

#: What the page and ``docs/reproduction.md`` are made from.
RECORD = "reproduction.json"
FORMATS = ("svg", "png", "pdf")
CLAIM_COLUMNS = (
    "claim",
    "paper",
    "ours, its rules",
    "ours, physical",
    "live",
    "verdict",
    "evidence",
    "note",
    "command",
)
FINDING_COLUMNS = ("the paper says", "here", "holds", "evidence", "command")


def csv_text(data: Data) -> str:
    """The table as CSV; numbers in full, so that the figure can be drawn again from it."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(data.columns)
    writer.writerows([["" if cell is None else cell for cell in row] for row in data.rows])
    return buffer.getvalue()


def claim_rows(claims: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """Recorded claims as rows of CLAIM_COLUMNS."""
    names = ("statement", "paper", "paper_rules", "physical", "live", "verdict", "kind", "note")
    return [[*(claim[name] or None for name in names), f"`{claim['command']}`"] for claim in claims]


def finding_rows(record: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """What experiments' records found of the paper's statements in words, as rows of FINDING_COLUMNS."""
    return [
        [
            finding["statement"],
            finding["ours"],
            HOLDS[finding["holds"]],
            finding["kind"],
            f"`moeless reproduce {entry['name']}`",
        ]
        for entry in record
        for finding in entry["findings"]
    ]


#: How a finding's three values are told.
HOLDS = {True: "yes", False: "no", None: "in part"}


@dataclass(frozen=True)
class Spent:
    """What an experiment's own results took: those that no experiment before it had needed."""

    seconds: float
    computed: int
    cached: int

    @classmethod
    def of(cls, seconds: Sequence[float | None]) -> Spent:
        """From the seconds of each result; None where it was read from the cache."""
        known = [value for value in seconds if value is not None]
        return cls(sum(known), len(known), len(seconds) - len(known))


def figure_name(experiment: Experiment, plot: str) -> str:
    """How a plot's files are called."""
    return experiment.name if plot == "main" else f"{experiment.name}-{plot}"


def draw(experiment: Experiment, options: Options, results: Mapping[str, Any], folder: Path) -> Drawn:
    """Draw an experiment and write its figures into ``folder``; what comes back carries no figures any more."""
    drawn = experiment.draw(options, results)
    for name, plot in drawn.plots.items():
        save_figure(folder, figure_name(experiment, name), plot.figure, FORMATS)
    return replace(drawn, plots={name: replace(plot, figure=None) for name, plot in drawn.plots.items()})


class Publisher:
    """Collects experiments as they finish and writes each one's files at once."""

    def __init__(self, run: Run, options: Options) -> None:
        self.run = run
        self.options = options
        self.record: list[dict[str, Any]] = []
        self._sections: list[page.Section] = []
        self._warnings: dict[str, list[str]] = {}

    def add(self, experiment: Experiment, drawn: Drawn, spent: Spent) -> None:
        """Write an experiment's tables, list its figures, which :func:`draw` has written; remember its claims."""
        blocks: list[page.Text | page.Table | page.Figure] = [
            page.Text(f"**Question.** {experiment.question}"),
            *([page.Text(f"**The paper.** {experiment.stated}")] if experiment.stated else []),
            *(
                page.Text(f"**Here: {HOLDS[one.holds]}.** {one.statement}: {finding_text(one)}.")
                for one in drawn.findings
            ),
            *map(page.Text, drawn.text),
        ]
        figures = []
        for name, plot in drawn.plots.items():
            full = figure_name(experiment, name)
            path = self.run.drawn(full, experiment.title, plot.caption)
            blocks.append(page.Figure(path, plot.caption, plot.kind, plot.label, plot.wide))
            figures.append({"name": full, "caption": plot.caption, "kind": plot.kind, "label": plot.label})
        tables = []
        for name, data in drawn.data.items():
            path = self.run.path / "data" / f"{experiment.name}-{name}.csv"
            write_text(path, csv_text(data))
            if data.show:
                self.run.table(f"tables/{path.stem}", data.columns, data.rows)
            tables.append({"name": path.stem, "caption": data.caption, "rows": len(data.rows)})
            if data.show:
                blocks.append(page.Table(data.columns, data.rows, f"{data.caption}." if data.caption else ""))
        for warning in drawn.warnings:
            self._warnings.setdefault(warning, []).append(experiment.name)
        self._sections.append(page.Section(experiment.title, blocks))
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
                "claims": [claim_record(claim) for claim in drawn.claims],
                "findings": [finding_record(finding) for finding in drawn.findings],
                "warnings": list(drawn.warnings),
                "study": experiment.name in STUDIES,
                "seconds": round(spent.seconds, 2),
                "computed": spent.computed,
                "cached": spent.cached,
            }
        )
        self.run.log({"experiment": experiment.name, **asdict(spent)})

    def finish(self) -> Path:
        """Write the record, the claims and the page; returns the page's path."""
        for warning, names in self._warnings.items():
            self.run.warn(f"{', '.join(names)}: {warning}")
        write_json(self.run.path / RECORD, {"format": 1, "full": self.options.full, "experiments": self.record})
        self.run.produced(self.run.path / RECORD, "reproduction")
        claims = [claim for entry in self.record for claim in entry["claims"]]
        first = []
        if claims:
            data = Data(CLAIM_COLUMNS, claim_rows(claims))
            caption = (
                "What the paper states in figures beside ours: under its own rules (linear costs, own-layer billing), "
                "under physical costs, and live."
            )
            first.append(page.Section("Claims", [page.Table(data.columns, data.rows, caption)]))
            write_text(self.run.path / "data" / "claims.csv", csv_text(data))
            self.run.table("claims", data.columns, data.rows)
        found = finding_rows(self.record)
        if found:
            caption = "What the paper states in words, and whether our data show the same."
            first.append(page.Section("Findings", [page.Table(FINDING_COLUMNS, found, caption)]))
            write_text(self.run.path / "data" / "findings.csv", csv_text(Data(FINDING_COLUMNS, found)))
            self.run.table("findings", FINDING_COLUMNS, found)
        sections = [*first, *self._sections]
        return page.write(self.run.path, self._title(), self._summary(claims), sections, manifest=self.run.snapshot())

    def _title(self) -> str:
        only = self.record[0]["title"] if len(self.record) == 1 else "The paper, figure by figure"
        return f"MoEless reproduced: {only}"

    def _summary(self, claims: list[dict[str, Any]]) -> list[str]:
        """What ran, what holds, and the headline."""
        figures = sum(len(entry["figures"]) for entry in self.record)
        size = "full" if self.options.full else "quick"
        computed, cached = (sum(entry[name] for entry in self.record) for name in ("computed", "cached"))
        studies = sum(entry["study"] for entry in self.record)
        paper = len(self.record) - studies
        what = " and ".join(
            text
            for text in (
                f"{_counted(paper, 'table or figure', 'tables and figures')} of arXiv 2603.06350" if paper else "",
                f"{_counted(studies, 'study', 'studies')} beyond it" if studies else "",
            )
            if text
        )
        what = what if paper else what.replace("beyond it", "beyond the paper")
        made = f"{what} at {size} size gave {figures} figures ({computed} results computed, {cached} from the cache)."
        return [made, *_held(self.record), *_headline(claims)]


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _held(record: list[dict[str, Any]]) -> list[str]:
    every = [finding["holds"] for entry in record if not entry["study"] for finding in entry["findings"]]
    if not every:
        return []
    yes, no, part = (every.count(value) for value in (True, False, None))
    return [
        f"Of {_counted(len(every), 'check', 'checks')} of what it says in words, {yes} hold here, {no} do not and "
        f"{part} hold in part."
    ]


def _headline(claims: list[dict[str, Any]]) -> list[str]:
    """The first claim that has a figure under both cost models."""
    for claim in claims:
        if claim["paper_rules"] and claim["physical"] and claim["kind"] != "derived":
            return [
                f"{claim['statement']}: **{claim['paper_rules']}** under the paper's costs, **{claim['physical']}** "
                f"under physical ones, {claim['live'] or 'not run'} live; the paper states {claim['paper']}."
            ]
    return []
