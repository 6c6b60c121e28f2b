"""Reading rows of a trace's shards into arrays, with checks."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moeless.errors import UserError
from moeless.files import reading, sha256
from moeless.traces.info import Shard, TraceInfo
from moeless.traces.schema import UNKNOWN, row_schema

AGAIN = "copy or record the trace again"
#: Row groups of vector columns kept decoded, for readers that walk through neighbouring rows.
CACHED_GROUPS = 4
#: Shards that one reader keeps open: a process may have far fewer files open than a long trace has shards.
OPEN_SHARDS = 16


def check_file(folder: Path, shard: Shard, *, digest: bool = False) -> Path:
    """The file of a shard.

    Raises:
        UserError: it is missing, has another size, or (with ``digest``) another content.
    """
    path = folder / shard.file
    if not path.is_file():
        raise UserError(f"{path} is missing; {AGAIN}")
    size = path.stat().st_size
    if size != shard.bytes:
        raise UserError(f"{path} has {size} bytes where trace.json says {shard.bytes}; {AGAIN}")
    if digest:
        with reading(path):
            same = sha256(path) == shard.sha256
        if not same:
            raise UserError(f"{path} has changed: its SHA-256 is not the one in trace.json; {AGAIN}")
    return path


class ShardReader:
    """Columns of consecutive rows over all shards of a trace."""

    def __init__(self, folder: Path, info: TraceInfo) -> None:
        self.folder = folder
        self.info = info
        self.schema = row_schema(info.kind, info.spec, weights=info.has_weights)
        # (shard, group index, first row, rows) of every row group, in order
        self._groups: list[tuple[int, int, int, int]] = []
        self._cache: OrderedDict[tuple[str, int], NDArray[Any]] = OrderedDict()
        self._paths = [check_file(folder, shard) for shard in info.shards]
        self._metadata: list[pq.FileMetaData] = []
        # files that were used last, the most recent at the end; readers may be several threads
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._lock = threading.Lock()
        first = 0
        for number, (path, shard) in enumerate(zip(self._paths, info.shards, strict=True)):
            file = self._file(number)
            if not file.schema_arrow.equals(self.schema):
                raise UserError(f"{path} does not have the columns of a {info.kind} trace of {info.spec.name}")
            self._metadata.append(file.metadata)
            for group in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                self._groups.append((number, group, first, rows))
                first += rows
            if file.metadata.num_rows != shard.rows:
                raise UserError(f"{path} has {file.metadata.num_rows} rows where trace.json says {shard.rows}; {AGAIN}")
        self.rows = first
        self._starts = np.array([start for _, _, start, _ in self._groups], np.int64)

    def _file(self, number: int) -> pq.ParquetFile:
        """An open shard; the one that was not used for longest is closed where there are too many."""
        with self._lock:
            file = self._open.pop(number, None)
            if file is None:
                path = self._paths[number]
                known = self._metadata[number] if number < len(self._metadata) else None
                with _content(path):
                    file = pq.ParquetFile(path, metadata=known)
            self._open[number] = file
            while len(self._open) > OPEN_SHARDS:
                # closed once no thread reads from it any more
                self._open.popitem(last=False)
            return file

    def group_ranges(self) -> Iterator[tuple[int, int]]:
        """(first row, end row) of every row group."""
        for _, _, start, rows in self._groups:
            yield start, start + rows

    def scalar(self, name: str, dtype: Any) -> NDArray[Any]:
        """A whole scalar column, ``[rows]``; nulls become ``UNKNOWN``."""
        made = np.empty(self.rows, dtype)
        for number, group, start, rows in self._groups:
            column = self._read(number, group, name)
            if column.null_count:
                column = pa.compute.fill_null(column.cast(pa.int64()), UNKNOWN)
            made[start : start + rows] = column.to_numpy()
        return made

    def vector(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start`` to ``stop`` of a vector column, ``[stop-start, width]``."""
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start}..{stop} lie outside a trace of {self.rows} rows")
        field = self.schema.field(name)
        made = np.empty((stop - start, field.type.list_size), field.type.value_type.to_pandas_dtype())
        first = int(np.searchsorted(self._starts, start, side="right")) - 1 if self._groups else 0
        for index in range(max(first, 0), len(self._groups)):
            _, _, group_start, rows = self._groups[index]
            if group_start >= stop:
                break
            low, high = max(start, group_start), min(stop, group_start + rows)
            if low < high:
                values = self._group_vector(name, index, keep=high - low < rows)
                made[low - start : high - start] = values[low - group_start : high - group_start]
        return made

    def _group_vector(self, name: str, index: int, *, keep: bool) -> NDArray[Any]:
        key = (name, index)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        number, group, _, rows = self._groups[index]
        width = self.schema.field(name).type.list_size
        chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in self._read(number, group, name).chunks]
        values = (np.concatenate(chunks) if len(chunks) != 1 else chunks[0]).reshape(rows, width)
        self._check_range(name, values)
        if keep:
            self._cache[key] = values
            while len(self._cache) > CACHED_GROUPS:
                self._cache.popitem(last=False)
        return values

    def _check_range(self, name: str, values: NDArray[Any]) -> None:
        if name == "experts" and values.size and int(values.max()) >= self.info.spec.E:
            raise UserError(
                f"{self.folder} holds expert id {int(values.max())}, but {self.info.spec.name} has "
                f"{self.info.spec.E} experts (0 to {self.info.spec.E - 1})"
            )

    def _read(self, number: int, group: int, name: str) -> pa.ChunkedArray:
        file = self._file(number)
        with _content(self._paths[number]):
            return file.read_row_group(group, columns=[name], use_threads=False).column(0)


@contextmanager
def _content(path: Path) -> Iterator[None]:
    """Turn what keeps a shard from being read into a sentence.

    Raises:
        UserError: it may not be read, or holds something else than it should.
    """
    try:
        with reading(path):
            yield
    except pa.ArrowException as error:
        raise UserError(f"{path} cannot be read ({_line(error)}); {AGAIN}") from None
    except OSError as error:
        # Parquet's own errors have no number; the system's are no fault of the file
        again = f"; {AGAIN}" if error.errno is None else ""
        raise UserError(f"{path} cannot be read ({_line(error)}){again}") from None


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
