"""A self-contained HTML page of a run: no network, light and dark, phone and print.

A page is a title, a summary, and sections of blocks. Blocks are paragraphs, tables and figures; each
figure says on what evidence it stands.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moeless.files import write_text
from moeless.report import style

PAGE = "index.html"

#: What each kind of evidence means, as shown under the mark.
EVIDENCE = {
    "measured": "really ran on this machine",
    "simulated": "computed from recorded, real routing",
    "synthetic": "computed from made-up routing",
    "stated": "a figure that the paper states",
    "derived": "arithmetic on published shapes",
}


@dataclass(frozen=True)
class Text:
    """A paragraph; ``**bold**`` and ````code```` in backticks are marked up, nothing else."""

    text: str


@dataclass(frozen=True)
class Link:
    """A table's cell that leads to another page of the same folder."""

    text: str
    target: str


@dataclass(frozen=True)
class Table:
    """Columns and rows; numbers are shown to four digits, None as a dash. Cells named in EVIDENCE become marks."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """An SVG or PNG file, a caption, and the evidence it stands on.

    ``label`` is a remark that belongs to the figure wherever it is shown, for example ``bundled model``.
    """

    path: Path
    caption: str
    evidence: str = ""
    label: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    title: str
    blocks: Sequence[Text | Table | Figure] = field(default_factory=tuple)


def write(
    run_path: Path,
    title: str,
    summary: str | Sequence[str],
    sections: Sequence[Section],
    *,
    manifest: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    label: str = "",
    name: str = PAGE,
) -> Path:
    """Write the page into the run folder.

    Args:
        summary: the few sentences that say what happened.
        manifest: of the run; shown whole, its facts also as a table. Warnings in it join ``warnings``.
        label: shown beside the title and on every figure that has no label of its own.

    Returns:
        the page's path.
    """
    path = run_path / name
    write_text(path, render(title, summary, sections, manifest=manifest, warnings=warnings, label=label))
    return path


def render(
    title: str,
    summary: str | Sequence[str],
    sections: Sequence[Section],
    *,
    manifest: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    label: str = "",
) -> str:
    """The page as a string of HTML."""
    sentences = [summary] if isinstance(summary, str) else list(summary)
    manifest = dict(manifest or {})
    remarks = list(dict.fromkeys([*warnings, *manifest.get("warnings", [])]))
    drawn = [
        {"title": section.title, "id": f"s{index}", "html": "\n".join(_block(block, label) for block in section.blocks)}
        for index, section in enumerate(sections)
    ]
    used = [kind for kind in EVIDENCE if any(f'mark-{kind}"' in section["html"] for section in drawn)]
    return str(
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            label=label,
            summary=" ".join(map(_inline, sentences)),
            sections=drawn,
            remarks=[_inline(remark) for remark in remarks],
            evidence=[(kind, EVIDENCE[kind]) for kind in used],
            facts=_facts(manifest),
            manifest=json.dumps(manifest, indent=1, ensure_ascii=False) if manifest else "",
        )
    )


@lru_cache(maxsize=1)
def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def mark(kind: str) -> str:
    """The coloured word that tells on what evidence a figure stands."""
    return f'<span class="mark mark-{html.escape(kind)}">{html.escape(kind)}</span>'


def _block(block: Text | Table | Figure, label: str) -> str:
    if isinstance(block, Text):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Table):
        return _table(block)
    return _figure(block, label)


def _inline(text: str) -> str:
    escaped = html.escape(text, quote=False)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped)


def cell_text(value: Any) -> str:
    """A table's cell as plain text: four significant digits, thousands separated, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
            return f"{value:.3e}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(cell_text(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, rows)]) + "\n"


#: Characters of a cell from which its column is a wide one.
LONG = 60


def _table(table: Table) -> str:
    numeric = [
        all(isinstance(row[i], (int, float)) or row[i] is None for row in table.rows) and bool(table.rows)
        for i in range(len(table.columns))
    ]
    # a sentence in a narrow column is a tall row
    longest = [max((len(cell_text(row[i])) for row in table.rows), default=0) for i in range(len(table.columns))]
    side = [
        "num" if number else "txt long" if length > LONG else "txt"
        for number, length in zip(numeric, longest, strict=True)
    ]
    head = "".join(
        f'<th scope="col" class="{kind}">{_inline(name)}</th>' for kind, name in zip(side, table.columns, strict=True)
    )
    rows = []
    for row in table.rows:
        cells = "".join(f'<td class="{kind}">{_cell(value)}</td>' for kind, value in zip(side, row, strict=True))
        rows.append(f"<tr>{cells}</tr>")
    caption = f"<caption><span>{_inline(table.caption)}</span></caption>" if table.caption else ""
    body = "\n".join(rows)
    content = f"{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>"
    return f'<div class="scroll" tabindex="0"><table>{content}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, Link):
        return f'<a href="{html.escape(quote(value.target))}">{html.escape(value.text)}</a>'
    return mark(value) if isinstance(value, str) and value in EVIDENCE else _inline(cell_text(value))


def _figure(figure: Figure, label: str) -> str:
    content = inline_svg(figure.path, figure.caption) if figure.path.suffix == ".svg" else _png(figure)
    marks = [mark(figure.evidence)] if figure.evidence else []
    shown = figure.label or label
    if shown:
        marks.append(f'<span class="mark mark-label">{html.escape(shown)}</span>')
    width = ' class="wide"' if figure.wide else ""
    return (
        f'<figure{width}><div class="drawing" tabindex="0">{content}</div>'
        f"<figcaption>{' '.join(marks)} {_inline(figure.caption)}</figcaption></figure>"
    )


def _png(figure: Figure) -> str:
    data = base64.b64encode(figure.path.read_bytes()).decode()
    return f'<img alt="{html.escape(figure.caption)}" src="data:image/png;base64,{data}">'


def inline_svg(path: Path, description: str) -> str:
    """A matplotlib SVG for use inside a page: ink and grid follow the page's colours, ids are made unique."""
    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    prefix = re.sub(r"\W", "", path.stem)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = text.replace(style.INK, "currentColor").replace(style.GRID, "var(--grid)")
    # the figure's own white ground would glare on a dark page
    text = re.sub(r'(<g id="[^"]*-patch_1">\s*<path[^>]*?)fill: #ffffff', r"\1fill: none", text, count=1)
    width, height = re.findall(r'(?:width|height)="([\d.]+)pt"', text)[:2]
    text = re.sub(r'\s(width|height)="[\d.]+pt"', "", text, count=2)
    label = html.escape(description, quote=True)
    style_text = f"max-width:{float(width) * 1.75:.0f}px;aspect-ratio:{width}/{height}"
    return text.replace("<svg", f'<svg role="img" aria-label="{label}" style="{style_text}"', 1)


def _facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not manifest:
        return []
    git = manifest.get("git")
    hardware = manifest.get("hardware") or {}
    memory = hardware.get("memory_bytes")
    gpus = ", ".join(hardware.get("gpus", [])) or "no GPU"
    machine = f"{hardware.get('cpu', '?')}, {hardware.get('cores', '?')} cores"
    if memory:
        machine += f", {memory / 2**30:.0f} GiB"
    revision = "not from a checkout" if not git else git["revision"][:12] + (" (changed files)" if git["dirty"] else "")
    facts = [
        ("command", str(manifest.get("command_line", "?"))),
        ("status", str(manifest.get("status", "?"))),
        ("seed", str(manifest.get("seed"))),
        ("started", str(manifest.get("start", "?"))),
        ("machine", f"{machine}; {gpus}"),
        ("revision", revision),
        ("versions", ", ".join(f"{name} {value}" for name, value in manifest.get("versions", {}).items())),
    ]
    if manifest.get("seconds") is not None:
        facts.insert(4, ("took", f"{manifest['seconds']:.1f} s"))
    for entry in manifest.get("inputs", []):
        facts.append(("input", f"{entry['path']} (sha256 {entry['sha256'][:16]}…)"))
    return facts
