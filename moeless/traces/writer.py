"""Writing trace folders shard by shard, so that a broken run can be resumed.

While it is written a folder's ``trace.json`` says ``complete: false`` and lists the shards that are
whole; anything else in the folder is a leftover that :meth:`resume` removes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moeless.errors import UserError
from moeless.files import check_writable, sha256, write_atomic
from moeless.traces.card import CARD_FILE, write_card
from moeless.traces.info import INFO_FILE, Shard, TraceInfo, library_versions
from moeless.traces.schema import UNKNOWN, row_group_rows, row_schema, shard_prefix
from moeless.traces.shards import check_file

#: Rows of one shard, at least (batches are never split); about 16 MB for 24 layers, top-4.
SHARD_ROWS = 131_072


class ShardWriter:
    """Collects rows into shards; subclasses know the columns of their kind.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """

    def __init__(
        self, path: str | Path, info: TraceInfo, *, shard_rows: int = SHARD_ROWS, resume: bool = False
    ) -> None:
        self.path = Path(path)
        self.shard_rows = shard_rows
        self.info = info.with_(versions=dict(info.versions) or library_versions("numpy", "pyarrow"))
        self.schema = row_schema(info.kind, info.spec, weights=info.has_weights)
        self.rows = 0
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._files: list[Shard] = []
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"cannot write {self.path}: it is a file, a trace is a folder")
        leftovers = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
        if resume and INFO_FILE in leftovers:
            self._resume()
        elif leftovers:
            raise UserError(f"{self.path} already exists and is not empty; choose another --out or remove it first")
        else:
            check_writable(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self.info.write(self.path)

    def _resume(self) -> None:
        found = TraceInfo.read(self.path)
        for name in ("kind", "spec", "source", "prompt_source", "seed", "settings", "versions", "router_input_dtype"):
            was, now = getattr(found, name), getattr(self.info, name)
            if _plain(was) != _plain(now):
                changed = _difference(was, now)
                raise UserError(
                    f"{self.path} was begun with another {name}{changed}; "
                    "repeat that command to finish it, or choose another --out"
                )
        self.info = found
        self._files = [entry for entry in found.files if entry.file.startswith("router_inputs-")]
        for entry in (*found.shards, *self._files):
            check_file(self.path, entry, digest=True)
        self.rows = sum(shard.rows for shard in found.shards)
        if not found.complete:
            self._remove_leftovers()

    def _known(self) -> set[str]:
        return {INFO_FILE, *(entry.file for entry in (*self.info.shards, *self.info.files))}

    def _remove_leftovers(self) -> None:
        for entry in self.path.iterdir():
            if entry.name not in self._known() and entry.is_file():
                entry.unlink()

    @property
    def complete(self) -> bool:
        """Whether the folder already holds the whole trace."""
        return self.info.complete

    @property
    def pending_rows(self) -> int:
        """Rows added since the last shard."""
        return self._pending_rows

    def _add(self, columns: Mapping[str, Any], rows: int) -> None:
        arrays = []
        for field in self.schema:
            if field.name not in columns:
                raise UserError(f"a {self.info.kind} trace needs the column {field.name!r}")
            arrays.append(_to_arrow(columns[field.name], field, rows))
        self._pending.append(pa.Table.from_arrays(arrays, schema=self.schema))
        self._pending_rows += rows

    def _check_vector(self, name: str, values: Any, shape: tuple[int, ...], limit: int | None) -> NDArray[Any]:
        array = np.asarray(values)
        if array.shape != shape:
            raise UserError(f"{name} must have shape {shape} (token, layer, k), got {array.shape}")
        if limit is not None and array.size:
            if array.dtype.kind not in "iu":
                raise UserError(f"{name} must be whole numbers, got {array.dtype}")
            if int(array.min()) < 0 or int(array.max()) >= limit:
                bad = int(array.min()) if int(array.min()) < 0 else int(array.max())
                raise UserError(f"{name} must lie in 0..{limit - 1}, got {bad}")
        return array

    def flush(self) -> None:
        """Write what is pending as one shard, whatever its size."""
        if not self._pending_rows:
            return
        number = len(self.info.shards)
        self._before_shard(number)
        name = f"{shard_prefix(self.info.kind)}-{number:05d}.parquet"
        table = pa.concat_tables(self._pending).combine_chunks()
        shard = _write_table(self.path / name, table)
        self.rows += self._pending_rows
        self._pending, self._pending_rows = [], 0
        self.info = self.info.with_(shards=(*self.info.shards, shard), files=tuple(self._files))
        self.info.write(self.path)

    def _after_batch(self) -> None:
        if self._pending_rows >= self.shard_rows:
            self.flush()

    def _before_shard(self, number: int) -> None:
        """Write what belongs beside the shard."""

    def _totals(self) -> dict[str, int]:
        return {"rows": self.rows}

    def _last_files(self) -> Sequence[Shard]:
        return ()

    def close(self, notes: Sequence[str] = ()) -> TraceInfo:
        """Write the rest, mark the trace complete.

        Raises:
            UserError: there is not one row.
        """
        if self.complete:
            return self.info
        self.flush()
        if not self.rows:
            raise UserError("the trace would hold no rows: there was nothing to record")
        self._files.extend(self._last_files())
        info = self.info.with_(counts=self._totals(), files=tuple(self._files), notes=(*self.info.notes, *notes))
        write_card(self.path / CARD_FILE, info)
        self.info = info.with_(complete=True)
        self.info.write(self.path)
        for entry in self.path.iterdir():
            if entry.name.startswith(".") and entry.is_file():
                entry.unlink()
        return self.info


def _to_arrow(values: Any, field: pa.Field, rows: int) -> pa.Array:
    if pa.types.is_fixed_size_list(field.type):
        flat = np.ascontiguousarray(values, field.type.value_type.to_pandas_dtype()).reshape(-1)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=field.type)
    if values is None:
        return pa.nulls(rows, field.type)
    array = np.asarray(values)
    if array.shape != (rows,):
        raise UserError(f"column {field.name!r} has shape {array.shape}, {rows} values are needed")
    if field.nullable:
        return pa.array(array.astype(np.int64), mask=array == UNKNOWN).cast(field.type)
    return pa.array(array.astype(field.type.to_pandas_dtype()))


def _write_table(path: Path, table: pa.Table) -> Shard:
    vectors = [field for field in table.schema if pa.types.is_fixed_size_list(field.type)]
    width = sum(field.type.list_size * field.type.value_type.bit_width // 8 for field in vectors)

    def write(partial: Path) -> None:
        pq.write_table(
            table,
            partial,
            row_group_size=row_group_rows(width),
            use_dictionary=False,
            # bytes of equal weight side by side: ids and weights compress half as large again
            column_encoding={f"{field.name}.list.element": "BYTE_STREAM_SPLIT" for field in vectors},
            compression="zstd",
            compression_level=1,
            write_statistics=False,
        )

    write_atomic(path, write)
    return Shard(path.name, table.num_rows, path.stat().st_size, sha256(path))


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _difference(was: Any, now: Any) -> str:
    if not (isinstance(was, Mapping) and isinstance(now, Mapping)):
        return "" if not isinstance(was, str | int | None) else f" ({was!r}, now {now!r})"
    keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    return f" ({keys[0]} was {was.get(keys[0])!r}, now {now.get(keys[0])!r})"
