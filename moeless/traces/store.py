"""Opening trace folders as objects with array accessors; rows are read in slices and checked.

Axes: T tokens (rows), L MoE layers, K experts per token, E experts, H hidden size, I iterations, N requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moeless.errors import UserError
from moeless.files import first_line, reading
from moeless.traces.info import (
    AGAIN,
    INFO_FILE,
    KINDS,
    REQUESTS_FILE,
    REQUESTS_SCHEMA,
    UNKNOWN,
    Kind,
    TraceInfo,
    row_schema,
)

#: Row groups of vector columns kept decoded, for readers that walk through neighbouring rows.
CACHED_GROUPS = 4
#: Shards that one trace keeps open: a process may have far fewer files open than a long trace has shards.
OPEN_SHARDS = 16
#: Rows whose values are checked at once.
_CHECKED_ROWS = 16_384
#: Name of the tensor in ``router_inputs-*.safetensors``.
ROUTER_INPUTS = "router_inputs"


@contextmanager
def _content(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn what keeps a file of a trace from being read (``errors``: a library's own) into a sentence.

    Raises:
        UserError: it may not be read, or holds something else than it should.
    """
    try:
        with reading(path):
            yield
    except (pa.ArrowException, OSError, *errors) as error:
        # libraries' own errors have no number; the system's are no fault of the file
        system = isinstance(error, OSError) and error.errno is not None
        raise UserError(f"{path} cannot be read ({first_line(error)}){'' if system else f'; {AGAIN}'}") from None


def _opener(paths: Sequence[Path]) -> Callable[[int], pq.ParquetFile]:
    """Opens files by number, for readers of several threads; those that were used last stay open."""
    metadata: dict[int, pq.FileMetaData] = {}

    # one that is dropped is closed once no thread reads from it any more
    @lru_cache(OPEN_SHARDS)
    def opened(number: int) -> pq.ParquetFile:
        with _content(paths[number]):
            file = pq.ParquetFile(paths[number], metadata=metadata.get(number))
        metadata[number] = file.metadata
        return file

    return opened


class _RowGroup(NamedTuple):
    """Rows ``start`` to ``stop`` of the trace: a row group of one of its shards."""

    shard: int
    number: int
    start: int
    stop: int


def _column(name: str, dtype: Any) -> cached_property[NDArray[Any]]:
    """An attribute that is a whole scalar column, read on first use."""

    def column(trace: Trace) -> NDArray[Any]:
        return trace._scalars(name, dtype)

    return cached_property(column)


class Trace(ABC):
    """What all kinds have in common.

    Attributes:
        spec: the model whose routing this is. num_rows: rows of all shards.
        phase_T: phase of every row, ``contracts.Phase`` values, u8.
    """

    phase_T = _column("phase", np.uint8)

    def __init__(self, path: Path, info: TraceInfo) -> None:
        self.path = path
        self.info = info
        self.spec = info.spec
        self._schema = row_schema(info.kind, info.spec, weights=info.has_weights)
        self._paths = [shard.check(path) for shard in info.shards]
        self._opened = _opener(self._paths)
        self._decoded: OrderedDict[tuple[str, int], NDArray[Any]] = OrderedDict()
        self._groups: list[_RowGroup] = []
        self.num_rows = 0
        for index, (file, shard) in enumerate(zip(self._paths, info.shards, strict=True)):
            opened = self._opened(index)
            if not opened.schema_arrow.equals(self._schema):
                raise UserError(f"{file} does not have the columns of a {info.kind} trace of {info.spec.name}")
            for number in range(opened.metadata.num_row_groups):
                stop = self.num_rows + opened.metadata.row_group(number).num_rows
                self._groups.append(_RowGroup(index, number, self.num_rows, stop))
                self.num_rows = stop
            rows = opened.metadata.num_rows
            if rows != shard.rows:
                raise UserError(f"{file} has {rows} rows where trace.json says {shard.rows}; {AGAIN}")
        self._starts = np.array([group.start for group in self._groups], np.int64)

    @abstractmethod
    def check_values(self) -> None:
        """Read the whole trace, a row group at a time, and check ids, order, phases, weights, totals.

        Raises:
            UserError: names the first thing that is wrong.
        """

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"rows {start}..{stop} lie outside a trace of {self.num_rows} rows")

    def _read(self, group: _RowGroup, name: str) -> pa.ChunkedArray:
        file = self._opened(group.shard)
        with _content(self._paths[group.shard]):
            return file.read_row_group(group.number, columns=[name], use_threads=False).column(0)

    def _scalars(self, name: str, dtype: Any) -> NDArray[Any]:
        """A whole scalar column, ``[rows]``; nulls become ``UNKNOWN``."""
        made = np.empty(self.num_rows, dtype)
        for group in self._groups:
            column = self._read(group, name)
            if column.null_count:
                column = pa.compute.fill_null(column.cast(pa.int64()), UNKNOWN)
            made[group.start : group.stop] = column.to_numpy()
        return made

    def _vectors(self, name: str, start: int, stop: int, *axes: int) -> NDArray[Any]:
        """Rows ``start`` to ``stop`` of a vector column, ``[stop-start, *axes]``."""
        self._check_range(start, stop)
        kind = self._schema.field(name).type
        made = np.empty((stop - start, kind.list_size), kind.value_type.to_pandas_dtype())
        first = max(int(np.searchsorted(self._starts, start, side="right")) - 1, 0)
        last = int(np.searchsorted(self._starts, stop)) if start < stop else 0
        for index in range(first, last):
            group = self._groups[index]
            low, high = max(start, group.start), min(stop, group.stop)
            values = self._group_vectors(name, index, keep=high - low < group.stop - group.start)
            made[low - start : high - start] = values[low - group.start : high - group.start]
        return made.reshape(-1, *axes)

    def _group_vectors(self, name: str, index: int, *, keep: bool) -> NDArray[Any]:
        """A vector column of one row group; it is kept for the next reader where this one wants a part of it."""
        values = self._decoded.pop((name, index), None)
        if values is None:
            column = self._read(self._groups[index], name)
            chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
            values = np.concatenate(chunks) if len(chunks) != 1 else chunks[0]
            values = values.reshape(-1, column.type.list_size)
            if name == "experts" and values.max(initial=0) >= self.spec.E:
                raise UserError(
                    f"{self.path} holds expert id {int(values.max())}, but {self.spec.name} has "
                    f"{self.spec.E} experts (0 to {self.spec.E - 1})"
                )
        if keep:
            self._decoded[name, index] = values
            if len(self._decoded) > CACHED_GROUPS:
                self._decoded.popitem(last=False)
        return values

    def _check_phases(self) -> None:
        if not np.isin(self.phase_T, (0, 1, 255)).all():
            raise UserError(f"{self.path}: a phase is none of 0, 1, 255")


class _RowTrace(Trace):
    """A trace whose rows are tokens.

    Attributes:
        token_T: token ids, i32, −1 where unknown.
        position_T: position of each token in its request, i64, −1 where unknown.
    """

    token_T = _column("token", np.int32)
    position_T = _column("position", np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens whose routing is recorded."""
        return self.num_rows

    @property
    def has_weights(self) -> bool:
        """Whether gate weights were recorded."""
        return self.info.has_weights

    @property
    def has_router_inputs(self) -> bool:
        """Whether gate inputs were recorded."""
        return self.info.router_input_dtype is not None

    def topk(self, start: int, stop: int) -> NDArray[np.uint16]:
        """Expert ids of rows ``[start, stop)``, u16 ``[T, L, K]``, in the gate's order.

        Raises:
            UserError: the shards hold ids outside the model's experts, or cannot be read.
        """
        return self._vectors("experts", start, stop, self.spec.L, self.spec.K)

    def load_topk(self) -> NDArray[np.uint16]:
        """Expert ids of all rows in memory, u16 ``[T, L, K]``."""
        return self.topk(0, self.num_rows)

    def weights(self, start: int, stop: int) -> NDArray[np.float16]:
        """Gate weights of rows ``[start, stop)`` as the experts receive them, f16 ``[T, L, K]``.

        Raises:
            UserError: the trace has none.
        """
        if not self.has_weights:
            raise UserError(f"{self.path} holds no gate weights; record the trace from the model to have them")
        return self._vectors("weights", start, stop, self.spec.L, self.spec.K)

    def router_inputs(self, start: int, stop: int) -> NDArray[np.float32]:
        """What each gate saw in rows ``[start, stop)``, f32 ``[T, L, H]``.

        Raises:
            UserError: the trace has none, or a file has another shape than the trace says.
        """
        if not self.has_router_inputs:
            raise UserError(f"{self.path} holds no router inputs; record it with `moeless trace --router-inputs`")
        self._check_range(start, stop)
        import torch
        from safetensors import SafetensorError, safe_open

        parts, first, axes = [], 0, (self.spec.L, self.spec.hidden_size)
        for entry in self.info.files:
            if not entry.file.startswith("router_inputs-"):
                continue
            low, high, path = max(start, first), min(stop, first + entry.rows), self.path / entry.file
            if low < high:
                with _content(path, SafetensorError), safe_open(path, framework="pt") as file:
                    tensor = file.get_slice(ROUTER_INPUTS)
                    shape = tuple(tensor.get_shape())
                    if shape != (entry.rows, *axes):
                        raise UserError(f"{path} has shape {shape}, which does not fit its trace")
                    parts.append(tensor[low - first : high - first].to(torch.float32).numpy())
            first += entry.rows
        if not parts:
            return np.empty((0, *axes), np.float32)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def check_values(self) -> None:
        """Check ids, weights, router inputs and the number of rows."""
        for start in range(0, self.num_rows, _CHECKED_ROWS):
            stop = min(start + _CHECKED_ROWS, self.num_rows)
            ids = np.sort(self.topk(start, stop), axis=-1)
            twice = (ids[..., 1:] == ids[..., :-1]).any(axis=(1, 2))
            if twice.any():
                raise UserError(f"{self.path}: row {start + twice.argmax()} names an expert twice in one layer's top-k")
            if self.has_weights and not np.isfinite(self.weights(start, stop)).all():
                raise UserError(f"{self.path}: gate weights in rows {start} to {stop - 1} are not all finite")
            if self.has_router_inputs and not np.isfinite(self.router_inputs(start, stop)).all():
                raise UserError(f"{self.path}: router inputs in rows {start} to {stop - 1} are not all finite")
        total = self.info.counts.get("rows")
        if total != self.num_rows:
            raise UserError(f"{self.path}: trace.json counts {total} rows, the shards hold {self.num_rows}")


@dataclass(frozen=True)
class RequestTable:
    """One entry per request, ascending; ``N`` requests.

    Attributes:
        request: ids, u32 ``[N]``.
        first_row: first row of each request in the trace, i64 ``[N]``; its rows end where the next one's begin.
        prompt_tokens: prompt rows of each request, i64 ``[N]``; 0 where only generated tokens were recorded.
        output_tokens: tokens generated, i64 ``[N]``. The last of them is recorded only by systems that feed it back.
        category, source_id: "" where unknown.
    """

    request: NDArray[np.uint32]
    first_row: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    category: list[str]
    source_id: list[str]

    def __len__(self) -> int:
        return len(self.request)

    @classmethod
    def read(cls, path: Path, rows: int) -> RequestTable:
        """Read and check ``requests.parquet`` of a trace of that many rows.

        Raises:
            UserError: the file is missing, cut short, or does not fit the rows.
        """
        if not path.exists():
            raise UserError(f"{path} is missing; {AGAIN}")
        with _content(path):
            table = pq.read_table(path)
        if not table.schema.equals(REQUESTS_SCHEMA):
            raise UserError(f"{path} does not have the columns of a request table; see docs/formats.md")
        ids, *numbers = (table.column(index).to_numpy() for index in range(4))
        texts = ([value or "" for value in table.column(index).to_pylist()] for index in (4, 5))
        loaded = cls(ids, *(column.astype(np.int64) for column in numbers), *texts)
        lengths = np.diff(np.append(loaded.first_row, rows))
        if len(loaded) == 0 and rows:
            raise UserError(f"{path} lists no request for {rows} rows")
        if len(loaded) and (loaded.first_row[0] != 0 or (lengths < 1).any()):
            raise UserError(f"{path}: first_row must start at 0 and ascend below {rows}, each request with a row")
        if (np.diff(ids.astype(np.int64)) < 1).any():
            raise UserError(f"{path}: request ids must ascend without repetition")
        if (loaded.prompt_tokens > lengths).any():
            raise UserError(f"{path}: a request has more prompt tokens than rows")
        return loaded


class TokenTrace(_RowTrace):
    """Routing per request, from which iterations of any batching can be composed.

    Attributes:
        requests: the table of requests. request_T: request id of every row, u32.
    """

    request_T = _column("request", np.uint32)

    def __init__(self, path: Path, info: TraceInfo) -> None:
        super().__init__(path, info)
        self.requests = RequestTable.read(path / REQUESTS_FILE, self.num_rows)

    @property
    def num_requests(self) -> int:
        """Requests recorded."""
        return len(self.requests)

    def rows(self, request: int) -> slice:
        """Rows of the request at that index of :attr:`requests`."""
        start = int(self.requests.first_row[request])
        return slice(start, start + int(self.rows_N[request]))

    @cached_property
    def rows_N(self) -> NDArray[np.int64]:
        """Rows of each request, ``[N]``."""
        return np.diff(np.append(self.requests.first_row, self.num_rows))

    def check_values(self) -> None:
        """Check requests, positions and phases, then what all rows have."""
        table = self.requests
        owner = np.repeat(np.arange(len(table)), self.rows_N)
        position = np.arange(self.num_rows) - table.first_row[owner]
        if (self.request_T != table.request[owner]).any():
            raise UserError(f"{self.path}: rows do not follow the order of requests.parquet")
        if (self.position_T != position).any():
            raise UserError(f"{self.path}: positions of a request do not count 0, 1, 2, ...")
        if (self.phase_T != (position >= table.prompt_tokens[owner])).any():
            raise UserError(f"{self.path}: phases do not agree with the requests' prompt tokens")
        super().check_values()


class IterationTrace(_RowTrace):
    """Routing per forward pass of a serving engine, replayed as recorded; sorted by (iteration, rank).

    Attributes:
        iteration_T: iteration id of every row, u32. rank_T: rank that owned each row, u16.
    """

    iteration_T = _column("iteration", np.uint32)
    rank_T = _column("rank", np.uint16)

    @cached_property
    def start_I(self) -> NDArray[np.int64]:
        """First row of each iteration."""
        return np.flatnonzero(np.diff(self.iteration_T.astype(np.int64), prepend=-1))

    @property
    def num_iterations(self) -> int:
        """Distinct iterations."""
        return len(self.start_I)

    def rows(self, index: int) -> slice:
        """Rows of the iteration at that index (0 to ``num_iterations``-1)."""
        stop = self.start_I[index + 1] if index + 1 < self.num_iterations else self.num_rows
        return slice(int(self.start_I[index]), int(stop))

    def check_values(self) -> None:
        """Check order and phases, then what all rows have."""
        key = self.iteration_T.astype(np.int64) * 65536 + self.rank_T
        if (np.diff(key) < 0).any():
            raise UserError(f"{self.path}: rows are not sorted by iteration and rank")
        self._check_phases()
        super().check_values()


class CountsTrace(Trace):
    """Tokens per expert of each forward pass, nothing finer.

    Attributes:
        iteration_I: iteration ids, u32, ascending.
        tokens_I: tokens of each iteration, i64, −1 where unknown.
        phase_I: phase of each iteration, u8, 255 for mixed or unknown.
    """

    iteration_I = _column("iteration", np.uint32)
    phase_I = _column("phase", np.uint8)
    tokens_I = _column("tokens", np.int64)

    def loads(self, start: int, stop: int) -> NDArray[np.uint32]:
        """Load of iterations ``[start, stop)``, u32 ``[I, L, E]``."""
        return self._vectors("load", start, stop, self.spec.L, self.spec.E)

    @property
    def num_iterations(self) -> int:
        """Iterations recorded."""
        return self.num_rows

    def check_values(self) -> None:
        """Check order, phases and sums."""
        if (np.diff(self.iteration_I.astype(np.int64)) < 1).any():
            raise UserError(f"{self.path}: iterations do not ascend")
        self._check_phases()
        K = self.spec.K
        for start in range(0, self.num_iterations, 256):
            sums = self.loads(start, min(start + 256, self.num_iterations)).sum(axis=2, dtype=np.int64)
            tokens = self.tokens_I[start : start + 256]
            # engines that drop tokens count fewer assignments, never more
            over = (tokens >= 0) & (sums > tokens[:, None] * K).any(axis=1)
            if over.any():
                raise UserError(
                    f"{self.path}: iteration {start + over.argmax()} counts more than tokens x top-{K} assignments"
                )


AnyTrace = TokenTrace | IterationTrace | CountsTrace
_CLASSES: dict[Kind, Callable[[Path, TraceInfo], AnyTrace]] = {
    "tokens": TokenTrace,
    "iterations": IterationTrace,
    "counts": CountsTrace,
}


def open_trace(path: str | Path, *, check: bool = False) -> AnyTrace:
    """Open a trace folder.

    Sizes, row counts and columns are always checked; ``check`` also verifies hashes and every value.

    Raises:
        UserError: there is no complete, intact trace at ``path``.
    """
    folder = Path(path)
    info = TraceInfo.read(folder)
    if not info.complete:
        raise UserError(f"the trace at {folder} is not complete: finish it by running the same `moeless trace` again")
    for entry in (*info.shards, *info.files) if check else info.files:
        entry.check(folder, digest=check)
    trace = _CLASSES[info.kind](folder, info)
    if trace.num_rows == 0:
        raise UserError(f"the trace at {folder} holds no rows")
    if check:
        trace.check_values()
    return trace


def holds_trace(path: Path) -> bool:
    """Whether an output folder holds a trace, finished or not; otherwise it is empty or does not exist.

    Raises:
        UserError: it holds something else, or is a file.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"cannot write {path}: it is a file, a trace is a folder")
    if (path / INFO_FILE).exists():
        return True
    if path.exists() and any(path.iterdir()):
        raise not_empty(path)
    return False


def not_empty(path: Path) -> UserError:
    """What is said of an output folder that holds something."""
    return UserError(f"{path} already exists and is not empty; choose another --out or remove it first")


def check_new_or_unfinished(path: Path) -> None:
    """Refuse an output folder that is neither empty nor an unfinished trace.

    Raises:
        UserError: it holds something else, or a complete trace.
    """
    if holds_trace(path) and TraceInfo.read(path).complete:
        raise UserError(f"{path} already holds a complete trace; choose another --out or remove it first")


def require_kind(trace: Trace, *kinds: Kind, command: str) -> None:
    """Refuse a trace that is not rich enough.

    Raises:
        UserError: its kind is none of ``kinds``.
    """
    if trace.info.kind not in kinds:
        needed, found = " or ".join(KINDS[kind].what for kind in kinds), KINDS[trace.info.kind].what
        raise UserError(f"{command} needs a trace of kind {needed}; {trace.path} is of kind {found}")
