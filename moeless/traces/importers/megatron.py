"""Importer of Megatron-core's router trace (``router_trace_rank{R}.jsonl``), kind *iterations*."""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moeless.contracts import Phase
from moeless.errors import UserError
from moeless.files import folder_atomic, sha256
from moeless.spec import MoESpec
from moeless.traces.info import TraceInfo
from moeless.traces.writers import IterationTraceWriter

_NAME = re.compile(r"router_trace_rank(\d+)\.jsonl")
Step = tuple[int, int, dict[int, np.ndarray[Any, Any]]]


def import_megatron(path: Path, out: Path, spec: MoESpec) -> TraceInfo:
    """Write an iteration trace from one rank's file, or a folder of them; files are read line by line.

    Raises:
        UserError: a line breaks the layout or does not fit the model, or ``out`` cannot be written.
    """
    files = sorted(path.glob("router_trace_rank*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f"{path} holds no router_trace_rank*.jsonl file")
    layers, numbering = _numbering(files, spec)
    info = TraceInfo(
        "iterations",
        spec,
        {"importer": "megatron", "files": [f.name for f in files], "sha256": [sha256(f) for f in files]},
        has_weights=False,
        notes=(f"layer numbers were read as {numbering}", "expert ids ascend, they are not in the gate's order"),
    )
    with folder_atomic(out) as folder:
        writer = IterationTraceWriter(folder, info)
        # each file ascends by step, so merging them keeps memory to one step a rank
        for step, rank, by_layer in heapq.merge(*(_steps(file, spec) for file in files), key=lambda entry: entry[:2]):
            missing = [layer for layer in layers if layer not in by_layer]
            if missing or len(by_layer) != spec.L:
                raise UserError(f"{path}: step {step} of rank {rank} has layers {sorted(by_layer)}, not {layers}")
            counts = {len(ids) for ids in by_layer.values()}
            if len(counts) > 1:
                raise UserError(f"{path}: step {step} of rank {rank} has layers of different token counts")
            writer.append(step, rank, int(Phase.MIXED), np.stack([by_layer[layer] for layer in layers], axis=1))
        if not writer.pending_rows and not writer.rows:
            raise UserError(f"{path} holds 0 tokens")
        return writer.close()


def _numbering(files: list[Path], spec: MoESpec) -> tuple[list[int], str]:
    """The layer numbers of the file for our layers, and how they count; one writer counts from 0, one from 1."""
    seen: set[int] = set()
    for line in _lines(files[0]):
        seen.add(line["layer"])
        if len(seen) >= spec.L:
            break
    zero, one = list(spec.moe_layers), [layer + 1 for layer in spec.moe_layers]
    ordinal = list(range(spec.L))
    for layers, name in (
        (zero, "0-based layer indices"),
        (one, "1-based layer numbers"),
        (ordinal, "0-based numbers of MoE layers"),
        ([layer + 1 for layer in ordinal], "1-based numbers of MoE layers"),
    ):
        if seen == set(layers):
            return layers, name
    raise UserError(
        f"{files[0]} names layers {sorted(seen)[:8]}; {spec.name} has MoE layers {zero[:8]} counted from 0"
        + (" and so on" if spec.L > 8 else "")
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as handle:
            for number, text in enumerate(handle, start=1):
                if not text.strip():
                    continue
                try:
                    line = json.loads(text)
                    line = {
                        **line,
                        "layer": int(line["layer"]),
                        "step": int(line["step"]),
                        "where": f"{path}, line {number}",
                    }
                except (json.JSONDecodeError, KeyError, TypeError, ValueError):
                    raise UserError(f"{path}, line {number} is not a router-trace record, or is cut short") from None
                # multi-token prediction layers are not the model's
                if line.get("block", "decoder") == "decoder":
                    yield line
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8") from None


def _steps(path: Path, spec: MoESpec) -> Iterator[Step]:
    """(step, rank, ids by layer) of one file."""
    match = _NAME.fullmatch(path.name)
    current: Step | None = None
    for line in _lines(path):
        rank = int(line["rank"]) if "rank" in line else int(match.group(1)) if match else 0
        if current is None or line["step"] != current[0]:
            if current is not None:
                if line["step"] < current[0]:
                    raise UserError(f"{line['where']}: step {line['step']} comes after step {current[0]}")
                yield current
            current = (line["step"], rank, {})
        if line["layer"] in current[2]:
            raise UserError(f"{line['where']}: layer {line['layer']} of step {line['step']} is there twice")
        current[2][line["layer"]] = _ids(line, spec)
    if current is not None:
        yield current


def _ids(line: dict[str, Any], spec: MoESpec) -> np.ndarray[Any, Any]:
    rows = line.get("top_indices")
    if not isinstance(rows, list) or len(rows) != line.get("num_tokens"):
        raise UserError(f"{line['where']}: top_indices must be a list of num_tokens rows")
    if any(not isinstance(row, list) or len(row) != spec.K for row in rows):
        raise UserError(f"{line['where']}: every token needs {spec.K} experts, as {spec.name} has top-{spec.K}")
    ids = np.array(rows) if rows else np.empty((0, spec.K), np.int64)
    if ids.dtype.kind not in "iu":
        raise UserError(f"{line['where']}: top_indices must be whole numbers")
    if ids.size and (ids.min() < 0 or ids.max() >= spec.E):
        raise UserError(f"{line['where']}: expert ids must lie in 0..{spec.E - 1}")
    return ids
