"""Importer of the documented Parquet layout: one row per token with ``request`` and nested ``experts``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moeless.errors import UserError
from moeless.spec import MoESpec
from moeless.traces.importers.npz import check_layout, write_requests
from moeless.traces.info import TraceInfo

LAYOUT = (
    "columns request (whole number, rows of a request consecutive), experts (list of layers x top-k ids) "
    "and optionally probs (alike), category, phase (0 prefill, 1 decode), token"
)


def import_parquet(path: Path, out: Path, spec: MoESpec) -> TraceInfo:
    """Write a token trace from a Parquet file of that model.

    Raises:
        UserError: the file breaks the layout or does not fit the model, or ``out`` cannot be written.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; a Parquet file with {LAYOUT} is needed")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole Parquet file ({str(error).splitlines()[0]})") from None
    missing = [name for name in ("request", "experts") if name not in table.column_names]
    if missing:
        raise UserError(f"{path} holds no column {missing[0]!r}; it needs {LAYOUT}")
    if not table.num_rows:
        raise UserError(f"{path} holds 0 tokens")
    return import_rows(path, out, spec, _columns(path, table, spec), importer="parquet")


def import_rows(path: Path, out: Path, spec: MoESpec, columns: dict[str, NDArray[Any]], *, importer: str) -> TraceInfo:
    """Write a token trace from one entry per token: ``request``, ``experts [T, L, K]`` and what else is there.

    Raises:
        UserError: the columns break the layout or do not fit the model.
    """
    request = columns["request"]
    if request.dtype.kind not in "iu":
        raise UserError(f"{path}: request must be whole numbers, got {request.dtype}")
    change = np.flatnonzero(np.diff(request.astype(np.int64))) + 1
    offsets = np.concatenate([[0], change, [len(request)]]).astype(np.int64)
    if len(np.unique(request[offsets[:-1]])) != len(offsets) - 1:
        raise UserError(f"{path}: the rows of a request must be consecutive")
    arrays: dict[str, NDArray[Any]] = {"experts": columns["experts"], "offsets": offsets}
    if "probs" in columns:
        arrays["probs"] = columns["probs"]
    if "token" in columns:
        arrays["tokens"] = columns["token"]
    if "category" in columns:
        arrays["category"] = columns["category"][offsets[:-1]]
    if "phase" in columns:
        arrays["prompt_tokens"] = _prompt_tokens(path, columns["phase"], offsets)
    check_layout(path, arrays, spec)
    return write_requests(path, out, spec, arrays, importer=importer)


def _prompt_tokens(path: Path, phase: NDArray[Any], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    if phase.dtype.kind not in "iu" or not np.isin(phase, (0, 1)).all():
        raise UserError(f"{path}: phase must be 0 (prefill) or 1 (decode)")
    back = np.flatnonzero(np.diff(phase.astype(np.int64)) < 0) + 1
    if len(np.setdiff1d(back, offsets)):
        raise UserError(f"{path}: prefill rows of a request must come before its decode rows")
    return np.add.reduceat((phase == 0).astype(np.int64), offsets[:-1])


def _columns(path: Path, table: pa.Table, spec: MoESpec) -> dict[str, NDArray[Any]]:
    made: dict[str, NDArray[Any]] = {}
    for name in ("request", "phase", "token"):
        if name in table.column_names:
            made[name] = _plain(path, table, name)
    if "category" in table.column_names:
        made["category"] = np.array([str(value or "") for value in table.column("category").to_pylist()])
    for name in ("experts", "probs"):
        if name in table.column_names:
            flat = _flat(path, name, table.column(name).combine_chunks(), table.num_rows)
            if flat.shape[1] != spec.L * spec.K:
                raise UserError(
                    f"{path}: {name} has {flat.shape[1]} values a token, but {spec.name} has {spec.L} MoE layers "
                    f"and top-{spec.K}, which make {spec.L * spec.K}"
                )
            made[name] = flat.reshape(-1, spec.L, spec.K)
    return made


def _plain(path: Path, table: pa.Table, name: str) -> NDArray[Any]:
    column = table.column(name)
    if column.null_count or not pa.types.is_integer(column.type):
        raise UserError(f"{path}: {name} must be whole numbers without gaps, got {column.type}")
    return np.asarray(column.to_numpy())


def _flat(path: Path, name: str, column: Any, rows: int) -> NDArray[Any]:
    """Values of a (nested) list column, ``[rows, values]``."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0)
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
