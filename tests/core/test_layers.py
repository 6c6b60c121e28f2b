"""Data flows one way: no module imports a row below its own in the architecture's table."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "architecture.md"


def _rows() -> list[set[str]]:
    """Module names of each row of "Layers of the package", top first."""
    section = TABLE.read_text(encoding="utf-8").split("## Layers of the package")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [{name.rstrip("/") for name in re.findall(r"`([^`]+)`", row)} for row in rows]


ROWS = _rows()
RANK = {name: rank for rank, names in enumerate(ROWS) for name in names}


def _imports(path: Path) -> set[str]:
    """Second-level names of ``moeless.*`` imports that a module makes when it is imported."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("moeless."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("moeless.")}
    return found


def _modules() -> list[tuple[str, Path]]:
    listed = []
    for entry in sorted((ROOT / "moeless").iterdir()):
        if entry.is_dir() and entry.name not in ("assets", "__pycache__"):
            listed += [(entry.name, path) for path in sorted(entry.rglob("*.py"))]
        elif entry.suffix == ".py" and entry.stem not in ("__init__", "__main__"):
            listed.append((entry.stem, entry))
    return listed


def test_every_part_has_its_row() -> None:
    assert {name for name, _ in _modules()} <= set(RANK)


@pytest.mark.parametrize("part", sorted(RANK))
def test_a_part_imports_only_rows_above(part: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports moeless.{other}"
        for name, path in _modules()
        if name == part
        for other in sorted(_imports(path))
        if RANK.get(other, -1) > RANK[part]
    ]
    assert not wrong
