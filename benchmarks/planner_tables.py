"""The tables of ``docs/planners.md`` from the result files of the planner benchmarks, and those files from scratch.

    python benchmarks/planner_tables.py [--run [NAME ...]]

``--run`` runs the benchmarks (all, or those named: gap, gpus2, gpus16, gpus32, gpus64, qwen3, deepseek, memory,
distance) and writes their files under ``results/reference/planners``. The document's generated parts lie between
``<!-- NAME -->`` and ``<!-- end NAME -->``; everything else in it is left as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCUMENT = ROOT / "results" / "reference" / "planners", ROOT / "docs" / "planners.md"
FIGURE = ROOT / "docs" / "planners-memory.svg"
RUNS: dict[str, list[str]] = {
    "gap": ["bench_gap_closed.py", "--exact", "history"],
    **{
        f"gpus{gpus}": ["bench_gap_closed.py", "--gpus", str(gpus), "--extra", "1", "--know", "history"]
        for gpus in (2, 16, 32, 64)
    },
    "qwen3": ["bench_gap_closed.py", "--model", "qwen3-30b-a3b", "--gpus", "8", "--extra", "1", "--know", "history"],
    "deepseek": ["bench_gap_closed.py", "--model", "deepseek-v3", "--gpus", "32", "--extra", "1", "--know", "history"],
    "memory": ["bench_memory_axis.py", "--figure", "docs/planners-memory.svg"],
    "distance": ["bench_distance.py"],
}
ORDER = ("static", "eplb", "eplb-hierarchical", "moeless", "craft", "llep", "metro", "elastic", "elastic-ahead")


def run(name: str) -> None:
    """Run one benchmark from the project's root, its result beside the others."""
    program, *arguments = RUNS[name]
    out = Path("results") / "reference" / "planners" / f"{name}.json"
    command = [sys.executable, str(Path("benchmarks") / program), *arguments, "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True)


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def made_by(data: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    predictor = f", predictor `{data['predictor']}`" if data.get("predictor") else ""
    command = re.sub(r" --out \S+", "", data["command"])
    revision = f"revision {data['revision']}, " if data.get("revision") else ""
    made = f"{revision}seed {data['seed']}{predictor}; {data['evidence']}; {versions}; {data['seconds']:.0f} s"
    return f"`{command}` ({made})"


def number(value: float) -> str:
    # a sum of times is exact to its last digits only: what is lost in them is no loss
    value = 0.0 if abs(value) < 1e-9 else value
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}"


def gap_tables(data: dict[str, Any]) -> str:
    """A table per GPUs, slots and knowledge: gap closed with control time zero / charged; the best in bold."""
    cells = data["cells"]
    regimes = list(dict.fromkeys(cell["regime"] for cell in cells))
    parts = [made_by(data)]
    for gpus, extra, know in dict.fromkeys((c["gpus"], c["extra_slots"], c["know"]) for c in cells):
        mine = [c for c in cells if (c["gpus"], c["extra_slots"], c["know"]) == (gpus, extra, know)]
        found = {(c["planner"], c["regime"], c["charged"]): c for c in mine}
        best = {
            (regime, charged): max(c["gap"] for c in mine if (c["regime"], c["charged"]) == (regime, charged))
            for regime in regimes
            for charged in (False, True)
        }
        rows = []
        for planner in (name for name in ORDER if any(c["planner"] == name for c in mine)):
            row = [planner]
            for regime in regimes:
                pair = []
                for charged in (False, True):
                    gap = found[planner, regime, charged]["gap"]
                    bold = gap >= best[regime, charged] - 1e-9 and gap > 0
                    pair.append(f"**{number(gap)}**" if bold else number(gap))
                row.append(" / ".join(pair))
            free = [found[planner, regime, False] for regime in regimes]
            held, moved = (sum(c[key] for c in free) / len(free) for key in ("extras", "moved"))
            rows.append([*row, f"{held:.1f}", f"{moved:.1f}"])
        title = f"{mine[0]['routing']}, {gpus} GPUs, +{extra} slot{'s' * (extra > 1)} a GPU, placement knows {know}"
        parts.append(f"**{title}**\n\n" + grid(["planner", *regimes, "extras", "moved"], rows))
        free = [c for c in mine if not c["charged"]]
        if any(c["moved"] > 0 for c in free) and all(c.get("gap_host") is not None for c in free):
            text = f"{title}: each layer waits for its moved copies, over the link / from host memory (control zero)"
            parts.append(f"{text}\n\n" + moved_table(free, regimes))
    return "\n\n".join(parts)


def moved_table(cells: list[dict[str, Any]], regimes: list[str]) -> str:
    """Gap closed with transfers charged, static EP among the planners; the best in bold."""
    keys = ("gap_link", "gap_host")
    best = {(r, key): max(c[key] for c in cells if c["regime"] == r) for r in regimes for key in keys}
    found = {(c["planner"], c["regime"]): c for c in cells}
    rows = []
    for planner in (name for name in ORDER if any(c["planner"] == name for c in cells)):
        row = [planner]
        for r in regimes:
            values = [(found[planner, r][key], best[r, key]) for key in keys]
            row.append(" / ".join(f"**{number(v)}**" if v >= top - 1e-9 else number(v) for v, top in values))
        rows.append(row)
    return grid(["planner", *regimes], rows)


def exact_table(data: dict[str, Any]) -> str:
    """How far ``elastic``'s dispatch is below the exact one on its own plans: gap closed, and per cent of time."""
    cells = [c for c in data["cells"] if c["below_exact"] is not None]
    regimes = list(dict.fromkeys(c["regime"] for c in cells))
    rows = []
    for extra, know in dict.fromkeys((c["extra_slots"], c["know"]) for c in cells):
        row = [f"+{extra}, {know}"]
        for regime in regimes:
            (c,) = (c for c in cells if (c["extra_slots"], c["know"], c["regime"]) == (extra, know, regime))
            row.append(f"{c['below_exact']:.3f} ({c['exact_saved_percent'] - c['saved_percent']:.2f} %)")
        rows.append(row)
    return grid(["elastic's plans", *regimes], rows)


def miss_list(data: dict[str, Any]) -> str:
    if not data["misses"]:
        return "No cell of `elastic` is below static EP, beaten, or too far from the exact dispatch."
    return "\n".join(f"- {line}" for line in data["misses"])


def memory_tables(data: dict[str, Any]) -> str:
    """The curves, then memory for what history closes."""
    points, parts = data["points"], [made_by(data)]
    curves = list(dict.fromkeys(p["curve"] for p in points))
    for regime in dict.fromkeys(p["regime"] for p in points):
        mine = {(p["curve"], p["cap"]): p for p in points if p["regime"] == regime}
        caps = list(dict.fromkeys(cap for _, cap in mine))
        rows = [
            [curve, *(f"{mine[curve, cap]['gap']:.2f} @ {mine[curve, cap]['held_gb']:.2f}" for cap in caps)]
            for curve in curves
        ]
        head = [f"{regime}: gap closed @ GB held", *(f"cap {cap}" for cap in caps)]
        parts.append(grid(head, rows))
    rows = [
        [f"{row['regime']}, {row['gap']:.2f}", *("never" if row[c] is None else f"{row[c]:.2f}" for c in curves)]
        for row in data["savings"]
    ]
    parts.append("GB held for the gap that `history` closes at each cap:\n\n" + grid(["regime, gap", *curves], rows))
    return "\n\n".join(parts)


def distance_table(data: dict[str, Any]) -> str:
    by_name = {row["planner"]: row for row in data["rows"]}
    names = [name for name in (*ORDER, *by_name) if name in by_name]
    rows = [[n, *(f"{by_name[n][key]:.2f}" for key in ("median", "p90", "worst"))] for n in dict.fromkeys(names)]
    head = ["per cent of time", "median", "90th percentile", "worst"]
    return f"{made_by(data)}, {data['instances']} instances\n\n" + grid(head, rows)


def sections() -> dict[str, str]:
    """The document's generated parts, of the result files that exist."""
    data = {name: json.loads(path.read_text()) for name in RUNS if (path := RESULTS / f"{name}.json").exists()}
    made = {name: gap_tables(data[name]) for name in RUNS if name in data and "cells" in data[name]}
    if "gap" in data:
        made |= {"exact": exact_table(data["gap"]), "misses": miss_list(data["gap"])}
    if "memory" in data:
        made["memory"] = memory_tables(data["memory"])
    if "distance" in data:
        made["distance"] = distance_table(data["distance"])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", choices=list(RUNS), metavar="NAME", help="all where none is named")
    options = parser.parse_args()
    if options.run is not None:
        for name in options.run or RUNS:
            run(name)
    text = DOCUMENT.read_text()
    for name, part in sections().items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end {name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, part=part: f"{match[1]}{part}{match[2]}", text)
        if not count:
            raise SystemExit(f"{DOCUMENT.name} has no place for {name!r}")
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
