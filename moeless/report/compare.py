"""Pages over several runs: side by side, with what differs in how they were made; and an index of all in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeless.errors import UserError
from moeless.metrics import catalogue
from moeless.metrics.result import Cell, Result, read_result
from moeless.report import page
from moeless.report.page import Section, Table, Text
from moeless.tracking import find_runs, read_manifest

COLUMNS = ("policy", "run", *catalogue.headings("compare"), "evidence")


@dataclass(frozen=True)
class Compared:
    """One run of a comparison."""

    name: str
    manifest: Mapping[str, Any]
    result: Result


def read_runs(paths: Sequence[Path]) -> list[Compared]:
    """Read run folders that hold a result.

    Raises:
        UserError: a folder is no run, holds no result, or is given twice.
    """
    resolved = [path.resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise UserError(f"{path.name} is given twice; compare needs different runs")
    if len(paths) < 2:
        raise UserError("compare needs at least two run folders")
    runs = []
    names: list[str] = []
    for path in resolved:
        manifest = read_manifest(path)
        if not (path / "result.json").is_file():
            raise UserError(
                f"{path} holds no result.json, so there is nothing to compare; its status is {manifest['status']}"
            )
        name = path.name if path.name not in names else f"{path.parent.name}/{path.name}"
        names.append(name)
        runs.append(Compared(name, manifest, read_result(path / "result.json")))
    return runs


def _key(cell: Cell) -> tuple[str, str, str]:
    return cell.costs, f"{cell.model} on {cell.cluster}", cell.policy


def rows(runs: Sequence[Compared]) -> dict[tuple[str, str], list[list[Any]]]:
    """Rows of COLUMNS by (cost model, model and cluster); a policy's runs stand together."""
    order = list(dict.fromkeys(_key(cell) for run in runs for cell in run.result.cells))
    found: dict[tuple[str, str], list[list[Any]]] = {}
    for key in order:
        first: Cell | None = None
        for run in runs:
            for cell in (cell for cell in run.result.cells if _key(cell) == key):
                numbers = catalogue.values("compare", cell, first)
                first = first or cell
                found.setdefault(key[:2], []).append(
                    [cell.policy + (" †" if cell.lossy else ""), run.name, *numbers, cell.evidence]
                )
    return found


def differences(runs: Sequence[Compared]) -> list[list[str]]:
    """What is not the same in the runs' configurations, inputs, seeds and revisions: name, then one value a run."""
    flat = [_described(run.manifest) for run in runs]
    names = dict.fromkeys(name for facts in flat for name in facts)
    made = [[name, *(facts.get(name, "–") for facts in flat)] for name in names]
    return [row for row in made if len(set(row[1:])) > 1]


def _described(manifest: Mapping[str, Any]) -> dict[str, str]:
    facts = {f"config.{name}": str(value) for name, value in manifest["config"].items()}
    facts |= {f"input {number}": entry["sha256"][:16] for number, entry in enumerate(manifest["inputs"])}
    facts |= {f"version.{name}": str(value) for name, value in manifest["versions"].items()}
    git = manifest["git"]
    revision = "–" if git is None else git["revision"][:12] + (" (changed files)" if git["dirty"] else "")
    return {"seed": str(manifest["seed"]), "status": str(manifest["status"]), "revision": revision, **facts}


def sections(runs: Sequence[Compared]) -> list[Section]:
    """The page's sections: results, then differences."""
    made = [
        Section(f"{costs} costs: {where}", [Table(list(COLUMNS), table, "Each policy in each run.")])
        for (costs, where), table in rows(runs).items()
    ]
    different = differences(runs)
    block: Text | Table = (
        Table(["what", *(run.name for run in runs)], different, "Everything else in the manifests is the same.")
        if different
        else Text("Configuration, inputs, versions and revision are the same in all runs.")
    )
    return [*made, Section("What differs", [block])]


def summary(runs: Sequence[Compared]) -> list[str]:
    """Two sentences: what is compared, and whether it may be."""
    tables = rows(runs)
    shared = sum(
        len({row[1] for row in table if row[0] == policy}) > 1
        for table in tables.values()
        for policy in {row[0] for row in table}
    )
    first = f"{len(runs)} runs stand side by side; {shared} policies under a cost model occur in more than one of them."
    inputs = {tuple(entry["sha256"] for entry in run.manifest["inputs"]) for run in runs}
    same = (
        "They read the same inputs."
        if len(inputs) == 1
        else "**They read different inputs**, so times and bills are of different work."
    )
    return [first, same]


def write_index(root: Path) -> Path:
    """Write ``index.html`` into a folder of runs, newest first, with a link to each run's page.

    Raises:
        UserError: the folder holds no run.
    """
    runs = find_runs(root)
    if not runs:
        raise UserError(f"{root} holds no run")
    rows: list[list[Any]] = []
    skipped = []
    for path in reversed(runs):
        try:
            manifest = read_manifest(path)
        except UserError as error:
            skipped.append(str(error))
            continue
        has_page = (path / page.PAGE).is_file()
        rows.append(
            [
                page.Link(path.name, f"{path.name}/{page.PAGE}") if has_page else path.name,
                manifest["command"],
                manifest["name"],
                manifest["status"],
                manifest["start"],
                manifest["seconds"],
            ]
        )
    table = Table(["run", "command", "on", "status", "started", "seconds"], rows)
    text = f"{len(rows)} runs, newest first."
    return page.write(root, "Runs", text, [Section("All runs", [table])], warnings=skipped)
