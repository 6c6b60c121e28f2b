"""Importer of the documented Parquet layout: one row per token with ``request`` and nested ``experts``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moeless.errors import UserError
from moeless.files import reading_whole
from moeless.spec import MoESpec
from moeless.traces.importers.request_rows import ImportedRequest, RequestGroups, write_requests
from moeless.traces.info import TraceInfo, row_group_rows

LAYOUT = (
    "columns request (whole number, rows of a request consecutive), experts (list of layers x top-k ids) "
    "and optionally probs (alike), category, phase (0 prefill, 1 decode), token"
)
#: Bytes of a column that are read ahead; without it a row group's columns are read whole.
_BUFFER_BYTES = 2**20


def import_parquet(path: Path, out: Path, spec: MoESpec) -> TraceInfo:
    """Write a token trace from a Parquet file of that model, batch of rows by batch of rows.

    Raises:
        UserError: the file breaks the layout or does not fit the model, or ``out`` cannot be written.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; a Parquet file with {LAYOUT} is needed")
    with _reading(path):
        opened = pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    with opened as file:
        names = file.schema_arrow.names
        missing = [name for name in ("request", "experts") if name not in names]
        if missing:
            raise UserError(f"{path} holds no column {missing[0]!r}; it needs {LAYOUT}")
        return write_requests(
            path,
            out,
            spec,
            read_requests(path, file, spec),
            importer="parquet",
            has_weights="probs" in names,
            has_prompts="phase" in names,
        )


def read_requests(path: Path, file: pq.ParquetFile, spec: MoESpec) -> Iterator[ImportedRequest]:
    """The file's requests, in its order.

    Raises:
        UserError: a row breaks the layout or does not fit the model.
    """
    known = ("request", "experts", "probs", "phase", "token", "category")
    wanted = [name for name in known if name in file.schema_arrow.names]
    groups = RequestGroups(path)
    # ids may be written as int64, so may weights
    batch_rows = row_group_rows(2 * 8 * spec.L * spec.K)
    batches = file.iter_batches(batch_size=batch_rows, columns=wanted, use_threads=False)
    while True:
        with _reading(path):
            batch = next(batches, None)
        if batch is None:
            break
        for columns in groups.add(_columns(path, batch, spec)):
            yield _request(path, columns)
    for columns in groups.end():
        yield _request(path, columns)


def _reading(path: Path) -> AbstractContextManager[None]:
    return reading_whole(path, "Parquet file", pa.ArrowException, OSError, ValueError)


def _request(path: Path, columns: dict[str, NDArray[Any]]) -> ImportedRequest:
    category = columns.get("category")
    return ImportedRequest(
        topk_TLK=columns["experts"],
        probs_TLK=columns.get("probs"),
        token_T=columns.get("token"),
        prompt_tokens=_prompt_tokens(path, columns["phase"]) if "phase" in columns else 0,
        category="" if category is None else str(category[0] or ""),
    )


def _prompt_tokens(path: Path, phase: NDArray[Any]) -> int:
    if not np.isin(phase, (0, 1)).all():
        raise UserError(f"{path}: phase must be 0 (prefill) or 1 (decode)")
    if (np.diff(phase.astype(np.int64)) < 0).any():
        raise UserError(f"{path}: prefill rows of a request must come before its decode rows")
    return int((phase == 0).sum())


def _columns(path: Path, batch: pa.RecordBatch, spec: MoESpec) -> dict[str, NDArray[Any]]:
    made: dict[str, NDArray[Any]] = {}
    names = batch.schema.names
    for name in ("request", "phase", "token"):
        if name in names:
            made[name] = _plain(path, batch, name)
    if "category" in names:
        made["category"] = np.asarray(batch.column("category").to_pylist(), object)
    for name in ("experts", "probs"):
        if name in names:
            flat = _flat(path, name, batch.column(name), batch.num_rows)
            if flat.shape[1] != spec.L * spec.K:
                raise UserError(
                    f"{path}: {name} has {flat.shape[1]} values a token, but {spec.name} has {spec.L} MoE layers "
                    f"and top-{spec.K}, which make {spec.L * spec.K}"
                )
            kind, said = ("iu", "whole numbers") if name == "experts" else ("f", "floating-point numbers")
            if flat.dtype.kind not in kind:
                raise UserError(f"{path}: {name} must be {said}, got {flat.dtype}")
            made[name] = flat.reshape(-1, spec.L, spec.K)
    return made


def _plain(path: Path, batch: pa.RecordBatch, name: str) -> NDArray[Any]:
    column = batch.column(name)
    if column.null_count or not pa.types.is_integer(column.type):
        raise UserError(f"{path}: {name} must be whole numbers without gaps, got {column.type}")
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _flat(path: Path, name: str, column: Any, rows: int) -> NDArray[Any]:
    """Values of a (nested) list column, ``[rows, values]``."""
    widths = 1
    while (
        pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    ):
        if column.null_count:
            raise UserError(f"{path}: {name} has rows without values")
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        if len(lengths) and (lengths != lengths[0]).any():
            raise UserError(f"{path}: {name} is ragged; every token needs the same number of layers and experts")
        widths *= int(lengths[0]) if len(lengths) else 0
        column = column.flatten()
    if widths == 1 or column.null_count:
        raise UserError(f"{path}: {name} must be lists of numbers without gaps")
    values = np.asarray(column.to_numpy(zero_copy_only=False))
    if values.dtype.kind not in "iuf":
        raise UserError(f"{path}: {name} must be numbers, got {column.type}")
    return values.reshape(rows, -1)
