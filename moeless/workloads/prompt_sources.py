"""Rows of prompt files and hub data sets, each with the words that locate it."""

from __future__ import annotations

import csv
import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from moeless.errors import UserError

#: (where the row stands, in words; its cells by column)
Row = tuple[str, dict[str, Any]]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def bundled_prompts() -> Path:
    """The file of prompts that ships with the package."""
    return Path(__file__).resolve().parent.parent / "assets" / "prompts.jsonl"


def source_kind(source: str | Path | None) -> Literal["bundled", "local", "hub"]:
    """Where a prompt source lies.

    Raises:
        UserError: it looks like a file that does not exist, or like nothing known.
    """
    if source is None or str(source) == "bundled":
        return "bundled"
    text = str(source)
    path = Path(text).expanduser()
    if path.exists():
        return "local"
    looks_local = isinstance(source, Path) or path.suffix.lower() in READERS or text.startswith((".", "/", "~"))
    if looks_local or not _HUB_ID.fullmatch(text):
        raise UserError(f"{text} does not exist; give a prompt file, a hub data set such as owner/name, or 'bundled'")
    return "hub"


def read_local(path: Path) -> Iterator[Row]:
    """Rows of a prompt file, or of every prompt file in a folder, by name.

    Raises:
        UserError: nothing readable is there, or a file is not what its suffix says.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS and file.is_file())
        if not files:
            raise UserError(f"{path} holds no prompt file; known are {_suffixes()}")
    elif path.suffix.lower() in READERS:
        files = [path]
    else:
        raise UserError(f"{path} is not a prompt file; known are {_suffixes()}")
    for file in files:
        try:
            yield from READERS[file.suffix.lower()](file)
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text (byte {error.start})") from None
        except OSError as error:
            raise UserError(f"cannot read {file} ({error.strerror or error})") from None


def read_hub(name: str, subset: str | None, split: str | None) -> Iterator[Row]:
    """Rows of a hub data set, through ``datasets`` and its cache.

    Raises:
        UserError: it cannot be loaded (offline, gated, no such set, subset or split).
    """
    import datasets

    try:
        with _no_retries_offline():
            loaded = datasets.load_dataset(name, subset)
    except Exception as error:  # its causes span datasets, huggingface_hub and the HTTP client
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"cannot load data set {name!r} ({reason}); without access to the hub, give a local prompt file"
        ) from error
    wanted = split or ("train" if "train" in loaded else next(iter(loaded)))
    if wanted not in loaded:
        raise UserError(f"data set {name!r} has no split {wanted!r}; it has {', '.join(loaded)}")
    for index, row in enumerate(loaded[wanted]):
        yield f"{name}, {wanted} row {index}", dict(row)


@contextmanager
def _no_retries_offline() -> Iterator[None]:
    """Where the hub cannot be reached, use its cache alone: its client would retry for half a minute first."""
    import datasets.config
    from huggingface_hub import constants

    endpoint = urlsplit(constants.ENDPOINT)
    before = (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    if not getproxies():
        try:
            socket.create_connection((endpoint.hostname or "", endpoint.port or 443), timeout=5).close()
        except OSError:
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    yield where, _as_row(json.loads(line), where)
                except json.JSONDecodeError as error:
                    raise UserError(f"{where} is not valid JSON ({error.msg})") from None


def _json(path: Path) -> Iterator[Row]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if isinstance(loaded, dict):
        lists = [entry for entry in loaded.values() if isinstance(entry, list)]
        loaded = lists[0] if len(lists) == 1 else None
    if not isinstance(loaded, list):
        raise UserError(f"{path} must hold a JSON list of prompts")
    for index, entry in enumerate(loaded):
        where = f"{path}, entry {index}"
        yield where, _as_row(entry, where)


def _as_row(entry: Any, where: str) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"prompt": entry}
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {type(entry).__name__}, a JSON object or a string is needed")
    return entry


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row:
                    raise UserError(f"{where} has more cells than the header has columns")
                yield where, dict(row)
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num} is not valid CSV ({error})") from None


def _text(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                yield f"{path}, line {number}", {"prompt": line.strip(), "id": str(number)}


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    yield f"{path}, row {index}", row
                    index += 1
    except pa.ArrowException as error:
        raise UserError(f"{path} is not a readable Parquet file ({str(error).splitlines()[0]})") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _text,
    ".parquet": _parquet,
}


def _suffixes() -> str:
    return ", ".join(sorted(READERS))
