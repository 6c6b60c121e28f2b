"""The dataset card that makes a trace folder a data set of the Hugging Face hub as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeless.files import write_text
from moeless.traces.info import TraceInfo
from moeless.traces.schema import shard_prefix

CARD_FILE = "README.md"

_COLUMNS = {
    "tokens": "One row per token whose routing was computed, sorted by request and position; `experts` and `weights` "
    "are flat vectors, index `layer * top_k + k`, in the gate's order. Phase 0 is prefill, 1 decode.",
    "iterations": "One row per token, sorted by iteration and rank of the serving engine that recorded it; `experts` "
    "is a flat vector, index `layer * top_k + k`. Phase 0 is prefill, 1 decode, 255 mixed or unknown.",
    "counts": "One row per forward pass; `load` is a flat vector of tokens per expert, "
    "index `layer * experts + expert`.",
}


def card(info: TraceInfo) -> str:
    """The card's Markdown text, front matter included."""
    spec, name = info.spec, shard_prefix(info.kind)
    lines = [
        "---",
        "configs:",
        f"- config_name: {name}",
        "  default: true",
        "  data_files:",
        "  - split: train",
        f"    path: {name}-*.parquet",
    ]
    if info.kind == "tokens":
        lines += ["- config_name: requests", "  data_files:", "  - split: train", "    path: requests.parquet"]
    lines += [
        "tags:",
        "- mixture-of-experts",
        "- expert-routing",
        "---",
        "",
        f"# Expert routing of {spec.name}" + (" (synthetic)" if info.synthetic else ""),
        "",
        _COLUMNS[info.kind],
        "",
        "| | |",
        "|---|---|",
        f"| model | {spec.name}: {spec.L} MoE layers, {spec.E} experts, top-{spec.K} |",
        f"| routing from | {_text(info.source)} |",
        f"| prompts | {_text(info.prompt_source) if info.prompt_source else 'unknown'} |",
        f"| seed | {'–' if info.seed is None else info.seed} |",
        *(f"| {key} | {value:,} |" for key, value in info.counts.items()),
        f"| synthetic | {'yes: generated from statistics, not recorded from a model' if info.synthetic else 'no'} |",
        f"| settings | {_text(info.settings) or '–'} |",
        f"| versions | {_text(info.versions)} |",
        "",
        *(f"- {note}" for note in info.notes),
        "",
        "Written by moeless; `trace.json` holds the full description and the SHA-256 of every file.",
    ]
    return "\n".join(lines) + "\n"


def write_card(path: Path, info: TraceInfo) -> None:
    """Write ``README.md`` of a trace folder atomically."""
    write_text(path, card(info))


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
