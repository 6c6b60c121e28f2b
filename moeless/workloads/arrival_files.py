"""Request traces that others publish, read by the columns that they have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from moeless.contracts import FloatArray
from moeless.errors import UserError
from moeless.workloads.arrival_series import ArrivalSeries

KNOWN = "Azure CSV, BurstGPT CSV, Mooncake or Bailian JSONL, or a CSV of arrival[,prompt_tokens,output_tokens]"
#: (time, prompt, output) columns of each CSV layout; times of the first are dates, of the others seconds.
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURST = ("Timestamp", "Request tokens", "Response tokens")
_PLAIN = ("arrival", "prompt_tokens", "output_tokens")


def read_arrivals(path: Path) -> ArrivalSeries:
    """Read a request trace, its layout found from its columns; times start at 0.

    Rows out of order are sorted. Rows without prompt or output (BurstGPT's failed requests) are dropped;
    ``notes`` counts them.

    Raises:
        UserError: the file is missing, of no known layout, or broken.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a request trace ({KNOWN})")
    try:
        with path.open(encoding="utf-8-sig") as handle:
            head = handle.readline(65536).strip()
        return _jsonl(path) if head.startswith("{") else _csv(path, head)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error})") from None


def _csv(path: Path, head: str) -> ArrivalSeries:
    columns = [name.strip().strip('"') for name in head.split(",")]
    layouts: tuple[tuple[str, ...], ...] = (_AZURE, _BURST, _PLAIN, _PLAIN[:1])
    layout = next((known for known in layouts if set(known) <= set(columns)), None)
    if layout is None:
        raise UserError(f"{path} is no known request trace; known are {KNOWN}")
    types = {layout[0]: pa.string(), **{name: pa.float64() for name in layout[1:]}}
    try:
        table = pacsv.read_csv(
            path, convert_options=pacsv.ConvertOptions(include_columns=list(layout), column_types=types)
        )
    except pa.ArrowException as error:
        raise UserError(f"{path} is not a readable CSV file ({_first_line(error)})") from None
    if table.num_rows == 0:
        raise UserError(f"{path} holds no request")
    if any(table[name].null_count for name in layout):
        raise UserError(f"{path} has an empty cell in one of the columns {', '.join(layout)}")
    text = table[layout[0]].combine_chunks()
    times = _dates(text, path) if layout is _AZURE else _seconds(text, path)
    lengths = [table[name].to_numpy() for name in layout[1:]]
    return _series(path, times, lengths)


def _dates(text: pa.StringArray, path: Path) -> FloatArray:
    """Seconds since the first row; fractions of up to nine digits, a zone in all rows or in none."""
    zone = "UTC" if text[0].as_py()[-6:-5] in ("+", "-") or text[0].as_py().endswith("Z") else None
    try:
        stamps = pc.cast(text, pa.timestamp("ns", tz=zone)).cast(pa.int64()).to_numpy()
    except pa.ArrowException as error:
        raise UserError(f"{path} has a TIMESTAMP that is not a date and time ({_first_line(error)})") from None
    return np.asarray(stamps - stamps[0], np.float64) / 1e9


def _seconds(text: pa.StringArray, path: Path) -> FloatArray:
    try:
        seconds: FloatArray = pc.cast(text, pa.float64()).to_numpy()
    except pa.ArrowException as error:
        raise UserError(f"{path} has an arrival that is not a number of seconds ({_first_line(error)})") from None
    return seconds


def _jsonl(path: Path) -> ArrivalSeries:
    rows: list[tuple[float, float, float]] = []
    # Bailian's time is in seconds and has a chat_id, Mooncake's is in milliseconds and has none
    scale = 1.0
    with path.open(encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row: Any = json.loads(line)
                rows.append((float(row["timestamp"]), float(row["input_length"]), float(row["output_length"])))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is not valid JSON ({error.msg})") from None
            except (KeyError, TypeError, ValueError):
                raise UserError(
                    f"{path}, line {number} needs numbers timestamp, input_length and output_length (Mooncake, Bailian)"
                ) from None
            if len(rows) == 1:
                scale = 1.0 if "chat_id" in row else 1e-3
    columns = np.array(rows, np.float64).T
    return _series(path, columns[0] * scale, list(columns[1:]))


def _series(path: Path, times: FloatArray, lengths: Sequence[FloatArray]) -> ArrivalSeries:
    if not np.isfinite(times).all():
        raise UserError(f"{path} has an arrival that is not a finite number")
    kept = np.ones(len(times), np.bool_)
    for column in lengths:
        if not np.isfinite(column).all() or (column < 0).any() or (column != np.floor(column)).any():
            raise UserError(f"{path} has a length that is not a whole number of tokens")
        kept &= column > 0
    if not kept.any():
        raise UserError(f"{path} holds no request with prompt and output")
    order = np.argsort(times[kept], kind="stable")
    times = times[kept][order]
    notes = {"dropped_without_tokens": int((~kept).sum())} if not kept.all() else {}
    prompt, output = (column[kept][order].astype(np.int64) for column in lengths) if lengths else (None, None)
    return ArrivalSeries(path.name, times - times[0], prompt, output, notes)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:160]
