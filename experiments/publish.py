"""From results to files: experiments are drawn, and their figures, CSV, claims and one page written."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeless.experiments.base import Data, Drawn, Experiment, Options
from moeless.experiments.catalogue import STUDIES, find
from moeless.experiments.runner import processes
from moeless.experiments.statements import claim_record, finding_record, finding_text
from moeless.files import write_json, write_text
from moeless.report import page
from moeless.tracking.run import Run, save_figure

#: What the page and ``docs/reproduction.md`` are made from.
RECORD = "reproduction.json"
FORMATS = ("svg", "png", "pdf")
#: With fewer experiments a second process costs more than it brings.
FEW = 3
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


def figure_name(experiment: Experiment, plot: str) -> str:
    """How a plot's files are called."""
    return experiment.name if plot == "main" else f"{experiment.name}-{plot}"


def draw(name: str, options: Options, results: Mapping[str, Any], folder: Path) -> Drawn:
    """Draw an experiment and write its figures into ``folder``; what comes back carries no figures any more."""
    (experiment,) = find(name)
    drawn = experiment.draw(options, results)
    for plot, one in drawn.plots.items():
        save_figure(folder, figure_name(experiment, plot), one.figure, FORMATS)
    return replace(drawn, plots={plot: replace(one, figure=None) for plot, one in drawn.plots.items()})


def drawn_in_turn(
    names: Sequence[str],
    options: Options,
    results: Mapping[str, Mapping[str, Any]],
    folder: Path,
    workers: int,
) -> Iterator[Drawn]:
    """What each experiment drew from its results, in the order given; several are drawn at a time, since a figure takes
    a second or two in its three formats."""
    if workers < 2 or len(names) < FEW:
        for name in names:
            yield draw(name, options, results[name], folder)
        return
    with processes(min(workers, len(names)), "a process that draws") as pool:
        waiting = [pool.submit(draw, name, options, results[name], folder) for name in names]
        for future in waiting:
            yield future.result()


class Publisher:
    """Collects experiments as they finish and writes each one's files at once."""

    def __init__(self, run: Run, options: Options) -> None:
        self.run = run
        self.options = options
        self.record: list[dict[str, Any]] = []
        self._sections: list[page.Section] = []
        self._warnings: dict[str, list[str]] = {}

    def add(self, experiment: Experiment, drawn: Drawn, seconds: Sequence[float | None]) -> None:
        """Write an experiment's tables, list its figures, which :func:`draw` has written; remember its claims.

        Args:
            seconds: that each of its own results took, those that no experiment before it had needed; None where it was
                read from the cache.
        """
        texts = [f"**Question.** {experiment.question}"]
        texts += [f"**The paper.** {experiment.stated}"] if experiment.stated else []
        texts += [f"**Here: {HOLDS[one.holds]}.** {one.statement}: {finding_text(one)}." for one in drawn.findings]
        blocks: list[page.Text | page.Table | page.Figure] = list(map(page.Text, (*texts, *drawn.text)))
        figures, tables, shown = [], [], {}
        for name, plot in drawn.plots.items():
            full = figure_name(experiment, name)
            path = self.run.drawn(full, experiment.title, plot.caption)
            blocks.append(page.Figure(path, plot.caption, plot.kind, plot.label, plot.wide))
            figures.append({"name": full, "caption": plot.caption, "kind": plot.kind, "label": plot.label})
        for name, data in drawn.data.items():
            full = f"{experiment.name}-{name}"
            write_text(self.run.path / "data" / f"{full}.csv", csv_text(data))
            tables.append({"name": full, "caption": data.caption, "rows": len(data.rows)})
            if data.show:
                self.run.table(f"tables/{full}", data.columns, data.rows)
                blocks.append(page.Table(data.columns, data.rows, f"{data.caption}." if data.caption else ""))
                rows = [list(row) for row in data.rows]
                shown[name] = {"columns": list(data.columns), "rows": rows, "caption": data.caption}
        for warning in drawn.warnings:
            self._warnings.setdefault(warning, []).append(experiment.name)
        self._sections.append(page.Section(experiment.title, blocks))
        known = [value for value in seconds if value is not None]
        spent = {"seconds": sum(known), "computed": len(known), "cached": len(seconds) - len(known)}
        self.record.append(
            {
                "name": experiment.name,
                "title": experiment.title,
                "question": experiment.question,
                "stated": experiment.stated,
                "text": list(drawn.text),
                "figures": figures,
                "tables": tables,
                "shown": shown,
                "claims": [claim_record(claim) for claim in drawn.claims],
                "findings": [finding_record(finding) for finding in drawn.findings],
                "warnings": list(drawn.warnings),
                "study": experiment.name in STUDIES,
                **spent,
                "seconds": round(spent["seconds"], 2),
            }
        )
        self.run.log({"experiment": experiment.name, **spent})

    def finish(self) -> Path:
        """Write the record, the claims and the page; returns the page's path."""
        for warning, names in self._warnings.items():
            self.run.warn(f"{', '.join(names)}: {warning}")
        write_json(self.run.path / RECORD, {"format": 1, "full": self.options.full, "experiments": self.record})
        self.run.produced(self.run.path / RECORD, "reproduction")
        claims = [claim for entry in self.record for claim in entry["claims"]]
        caption = (
            "What the paper states in figures beside ours: under its own rules (linear costs, own-layer billing), "
            "under physical costs, and live."
        )
        words = "What the paper states in words, and whether our data show the same."
        first = []
        for name, columns, rows, text in (
            ("claims", CLAIM_COLUMNS, claim_rows(claims), caption),
            ("findings", FINDING_COLUMNS, finding_rows(self.record), words),
        ):
            if rows:
                first.append(page.Section(name.title(), [page.Table(columns, rows, text)]))
                write_text(self.run.path / "data" / f"{name}.csv", csv_text(Data(columns, rows)))
                self.run.table(name, columns, rows)
        only = self.record[0]["title"] if len(self.record) == 1 else "The paper, figure by figure"
        sections, summary = [*first, *self._sections], self._summary(claims)
        return page.write(self.run.path, f"MoEless reproduced: {only}", summary, sections, manifest=self.run.snapshot())

    def _summary(self, claims: list[dict[str, Any]]) -> list[str]:
        """What ran, what holds, and the headline."""
        figures = sum(len(entry["figures"]) for entry in self.record)
        size = "full" if self.options.full else "quick"
        computed, cached = (sum(entry[name] for entry in self.record) for name in ("computed", "cached"))
        studies = sum(entry["study"] for entry in self.record)
        paper = len(self.record) - studies
        what = [f"{_counted(paper, 'table or figure', 'tables and figures')} of arXiv 2603.06350"] if paper else []
        if studies:
            what.append(f"{_counted(studies, 'study', 'studies')} beyond {'it' if paper else 'the paper'}")
        made = f"{' and '.join(what)} at {size} size gave {figures} figures ({computed} results computed, {cached} from"
        return [f"{made} the cache).", *_held(self.record), *_headline(claims)]


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
