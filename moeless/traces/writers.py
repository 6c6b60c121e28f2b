"""Writing trace folders shard by shard, so that a broken run can be resumed; one writer per kind of trace.

While it is written a folder's ``trace.json`` says ``complete: false`` and lists the shards that are
whole; anything else in the folder is a leftover that is removed when the run is resumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moeless.errors import UserError
from moeless.files import check_writable, write_atomic, write_text
from moeless.traces.info import (
    CARD_FILE,
    INFO_FILE,
    KINDS,
    REQUESTS_FILE,
    REQUESTS_SCHEMA,
    UNKNOWN,
    Kind,
    Shard,
    TraceInfo,
    library_versions,
    row_group_rows,
    row_schema,
)
from moeless.traces.store import ROUTER_INPUTS, holds_trace, not_empty

#: Rows of one shard, at least (batches are never split); about 16 MB for 24 layers, top-4.
SHARD_ROWS = 131_072
#: What must not have changed where a recording is resumed.
_SAME = ("kind", "spec", "source", "prompt_source", "seed", "settings", "versions", "router_input_dtype")


class ShardWriter:
    """Collects rows into shards; subclasses know the columns of their kind.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """

    kind: ClassVar[Kind]
    #: The writer in sentences, and what :attr:`num_entries` counts.
    named: ClassVar[str]
    counts: ClassVar[str] = "iterations"

    def __init__(
        self, path: str | Path, info: TraceInfo, *, shard_rows: int = SHARD_ROWS, resume: bool = False
    ) -> None:
        if info.kind != self.kind:
            raise UserError(f"{self.named} trace writer cannot write kind {info.kind!r}")
        self.path = Path(path)
        self.shard_rows = shard_rows
        self.info = replace(info, versions=dict(info.versions) or library_versions("numpy", "pyarrow"))
        self.schema = row_schema(info.kind, info.spec, weights=info.has_weights)
        #: Rows of whole shards; ``pending_rows`` are in memory.
        self.rows = self.pending_rows = 0
        #: Requests or iterations in whole shards and in memory.
        self.num_entries = 0
        self._pending: list[pa.Table] = []
        self._files: list[Shard] = []
        begun = holds_trace(self.path)
        if begun and not resume:
            raise not_empty(self.path)
        if begun:
            self._resume()
        else:
            check_writable(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self.info.write(self.path)

    def _resume(self) -> None:
        found = TraceInfo.read(self.path)
        for name in _SAME:
            was, now = getattr(found, name), getattr(self.info, name)
            if was != now:
                raise UserError(
                    f"{self.path} was begun with another {name}{_difference(was, now)}; "
                    "repeat that command to finish it, or choose another --out"
                )
        self.info = found
        self._files = [entry for entry in found.files if entry.file.startswith(ROUTER_INPUTS)]
        for entry in (*found.shards, *self._files):
            entry.check(self.path, digest=True)
        self.rows = sum(shard.rows for shard in found.shards)
        self.num_entries = found.counts.get(self.counts, 0)
        if not found.complete:
            known = {INFO_FILE, *self._hidden_parts(), *(entry.file for entry in (*found.shards, *found.files))}
            for leftover in self.path.iterdir():
                if leftover.name not in known and leftover.is_file():
                    leftover.unlink()

    @property
    def complete(self) -> bool:
        """Whether the folder already holds the whole trace."""
        return self.info.complete

    def _routing(self, where: str, topk: Any, weights: Any) -> dict[str, NDArray[Any]]:
        """Columns of expert ids and, where the trace has them, gate weights ``[rows, L, K]``."""
        shape = (len(topk), self.info.spec.L, self.info.spec.K)
        columns = {"experts": _checked(where + "experts", topk, shape, self.info.spec.E)}
        if self.info.has_weights:
            columns["weights"] = _half(where, _checked(where + "weights", weights, shape))
        return columns

    def _add(self, columns: Mapping[str, Any], rows: int) -> None:
        arrays = [_to_arrow(columns[field.name], field, rows) for field in self.schema]
        self._pending.append(pa.Table.from_arrays(arrays, schema=self.schema))
        self.pending_rows += rows

    def _end_batch(self) -> None:
        if self.pending_rows >= self.shard_rows:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one shard, whatever its size."""
        if not self.pending_rows:
            return
        number = len(self.info.shards)
        self._before_shard(number)
        path = self.path / f"{KINDS[self.kind].shards}-{number:05d}.parquet"
        _write_shard(path, pa.concat_tables(self._pending).combine_chunks())
        self.rows += self.pending_rows
        shard = Shard.of(path, self.pending_rows)
        self._pending, self.pending_rows = [], 0
        self.info = replace(self.info, shards=(*self.info.shards, shard), files=tuple(self._files))
        self.info.write(self.path)

    def _before_shard(self, number: int) -> None:
        """Write what belongs beside the shard."""

    def _hidden_parts(self) -> Sequence[str]:
        """Names of the files beside the whole shards that are needed until the trace is closed."""
        return ()

    def _write_last_files(self) -> None:
        """Write what belongs to the whole trace."""

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
        self._write_last_files()
        counts = {"rows": self.rows, self.counts: self.num_entries}
        info = replace(self.info, counts=counts, files=tuple(self._files), notes=(*self.info.notes, *notes))
        write_text(self.path / CARD_FILE, info.card())
        self.info = replace(info, complete=True)
        self.info.write(self.path)
        for name in self._hidden_parts():
            (self.path / name).unlink()
        return self.info


@dataclass(frozen=True)
class RequestRows:
    """All rows of one request, as a :class:`TokenTraceWriter` takes them.

    Attributes:
        request: id, above all earlier ones.
        topk_TLK: expert ids; weights_TLK: gate weights or None; input_TLH: torch tensor of gate inputs or None.
        prompt_tokens: how many of the rows are prompt (phase 0); the rest is phase 1.
        output_tokens: tokens generated.
        token_T: token ids, None where unknown.
    """

    request: int
    topk_TLK: NDArray[np.integer[Any]]
    prompt_tokens: int
    output_tokens: int
    weights_TLK: NDArray[np.floating[Any]] | None = None
    token_T: NDArray[np.integer[Any]] | None = None
    input_TLH: Any = None
    category: str = ""
    source_id: str = ""


class TokenTraceWriter(ShardWriter):
    """Writes a trace of kind *tokens*, batch by batch of whole requests."""

    kind = "tokens"
    named = "a token"
    counts = "requests"

    def __init__(
        self, path: str | Path, info: TraceInfo, *, shard_rows: int = SHARD_ROWS, resume: bool = False
    ) -> None:
        self._next_request = 0
        # lines of the request table, and gate inputs, of the pending rows
        self._requests: list[dict[str, Any]] = []
        self._inputs: list[Any] = []
        super().__init__(path, info, shard_rows=shard_rows, resume=resume)

    @property
    def num_requests(self) -> int:
        """Requests in whole shards and in memory."""
        return self.num_entries

    def _resume(self) -> None:
        super()._resume()
        if self.complete:
            return
        for name in self._hidden_parts():
            part = self.path / name
            if not part.exists():
                raise UserError(f"{part} is missing, so the recording cannot be resumed; remove the folder")
            ids = pq.read_table(part).column("request")
            self.num_entries += len(ids)
            self._next_request = ids[-1].as_py() + 1

    def append(self, batch: Sequence[RequestRows]) -> None:
        """Add a batch of requests; a shard never ends inside one.

        Raises:
            UserError: shapes, ids or order break the format.
        """
        for entry in batch:
            self._append(entry)
        self._end_batch()

    def _append(self, entry: RequestRows) -> None:
        rows, where = len(entry.topk_TLK), f"request {entry.request}: "
        if entry.request < self._next_request:
            raise UserError(f"request {entry.request} comes after {self._next_request - 1}; ids must ascend")
        if rows < 1 or not 0 <= entry.prompt_tokens <= rows:
            raise UserError(f"request {entry.request} has {rows} rows and {entry.prompt_tokens} prompt tokens")
        if self.info.has_weights and entry.weights_TLK is None:
            raise UserError(where + "gate weights are missing")
        position = np.arange(rows)
        columns = {
            "request": np.full(rows, entry.request),
            "position": position,
            "phase": position >= entry.prompt_tokens,
            "token": entry.token_T,
            **self._routing(where, entry.topk_TLK, entry.weights_TLK),
        }
        if self.info.router_input_dtype is not None:
            shape = (rows, self.info.spec.L, self.info.spec.hidden_size)
            if entry.input_TLH is None or tuple(entry.input_TLH.shape) != shape:
                raise UserError(where + "router inputs are missing or of another shape")
            self._inputs.append(entry.input_TLH)
        line = {
            "request": entry.request,
            "first_row": self.rows + self.pending_rows,
            "prompt_tokens": entry.prompt_tokens,
            "output_tokens": entry.output_tokens,
            "category": entry.category or None,
            "source_id": entry.source_id or None,
        }
        self._add(columns, rows)
        self._requests.append(line)
        self.num_entries += 1
        self._next_request = entry.request + 1

    def _before_shard(self, number: int) -> None:
        table = pa.Table.from_pylist(self._requests, schema=REQUESTS_SCHEMA)
        write_atomic(self.path / _part(number), lambda partial: pq.write_table(table, partial, **_PLAIN))
        self._requests = []
        if self.info.router_input_dtype is not None:
            import torch
            from safetensors.torch import save_file

            path = self.path / f"{ROUTER_INPUTS}-{number:05d}.safetensors"
            inputs = torch.cat(self._inputs)
            write_atomic(path, lambda partial: save_file({ROUTER_INPUTS: inputs}, partial))
            self._files.append(Shard.of(path, len(inputs)))
            self._inputs = []

    def _hidden_parts(self) -> Sequence[str]:
        return [_part(number) for number in range(len(self.info.shards))]

    def _write_last_files(self) -> None:
        path = self.path / REQUESTS_FILE

        def merge(partial: Path) -> None:
            with pq.ParquetWriter(partial, REQUESTS_SCHEMA, **_PLAIN) as out:
                for name in self._hidden_parts():
                    out.write_table(pq.read_table(self.path / name))

        write_atomic(path, merge)
        self._files.append(Shard.of(path, self.num_entries))


class IterationTraceWriter(ShardWriter):
    """Writes a trace of kind *iterations*; rows ascend by (iteration, rank)."""

    kind = "iterations"
    named = "an iteration"
    _last = (-1, -1)

    def append(
        self,
        iteration: int,
        rank: int,
        phase_T: Any,
        topk_TLK: Any,
        weights_TLK: Any = None,
        token_T: Any = None,
        position_T: Any = None,
    ) -> None:
        """Add one rank's tokens of one iteration; ``phase_T`` holds ``contracts.Phase`` values.

        Raises:
            UserError: shapes, ids or order break the format.
        """
        if (iteration, rank) <= self._last:
            raise UserError(f"iteration {iteration}, rank {rank} comes after {self._last}; they must ascend")
        rows = len(topk_TLK)
        if not rows:
            return
        columns = {
            "iteration": np.full(rows, iteration),
            "rank": np.full(rows, rank),
            "position": position_T,
            "phase": np.broadcast_to(np.asarray(phase_T), (rows,)),
            "token": token_T,
            **self._routing(f"iteration {iteration}, rank {rank}: ", topk_TLK, weights_TLK),
        }
        self._add(columns, rows)
        self.num_entries += iteration != self._last[0]
        self._last = (iteration, rank)
        self._end_batch()


class CountsTraceWriter(ShardWriter):
    """Writes a trace of kind *counts*."""

    kind = "counts"
    named = "a counts"
    _last = -1

    def __init__(self, path: str | Path, info: TraceInfo, *, shard_rows: int = 4096) -> None:
        super().__init__(path, replace(info, has_weights=False), shard_rows=shard_rows)

    def append(self, iteration_I: Any, phase_I: Any, load_ILE: Any, tokens_I: Any = None) -> None:
        """Add iterations: loads ``[I, L, E]`` in tokens, phases, token counts (None or −1 where unknown).

        Raises:
            UserError: shapes, counts or order break the format.
        """
        spec = self.info.spec
        iteration = np.atleast_1d(np.asarray(iteration_I, np.int64))
        count = len(iteration)
        if not count:
            return
        if iteration[0] <= self._last or (np.diff(iteration) < 1).any():
            raise UserError("iterations of a counts trace must ascend without repetition")
        columns = {
            "iteration": iteration,
            "phase": np.broadcast_to(np.asarray(phase_I), (count,)),
            "tokens": tokens_I,
            "load": _checked("load", load_ILE, (count, spec.L, spec.E), 2**32),
        }
        self._add(columns, count)
        self.num_entries += count
        self._last = int(iteration[-1])
        self._end_batch()


def _checked(name: str, values: Any, shape: tuple[int, ...], limit: int | None = None) -> NDArray[Any]:
    """The values as an array of that shape; with a limit, whole numbers from 0 to below it."""
    array = np.asarray(values)
    if array.shape != shape:
        raise UserError(f"{name} must have shape {shape} (token, layer, k), got {array.shape}")
    if limit is not None and array.size:
        if array.dtype.kind not in "iu":
            raise UserError(f"{name} must be whole numbers, got {array.dtype}")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= limit:
            raise UserError(f"{name} must lie in 0..{limit - 1}, got {low if low < 0 else high}")
    return array


def _half(where: str, weights: NDArray[Any]) -> NDArray[np.float16]:
    """Gate weights as float16."""
    if weights.dtype.kind != "f":
        raise UserError(f"{where}weights must be floating-point numbers, got {weights.dtype}")
    with np.errstate(over="ignore"):
        half = weights.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"{where}weights must be finite and fit float16")
    return half


def _to_arrow(values: Any, field: pa.Field, rows: int) -> pa.Array:
    """One column of a table; None and ``UNKNOWN`` become nulls."""
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


#: How tables are written, with nothing that differs from run to run.
_PLAIN: dict[str, Any] = {"use_dictionary": False, "compression": "zstd", "compression_level": 1}


def _write_shard(path: Path, table: pa.Table) -> None:
    vectors = [field for field in table.schema if pa.types.is_fixed_size_list(field.type)]
    width = sum(field.type.list_size * field.type.value_type.bit_width // 8 for field in vectors)

    def write(partial: Path) -> None:
        pq.write_table(
            table,
            partial,
            row_group_size=row_group_rows(width),
            # bytes of equal weight side by side: ids and weights compress half as large again
            column_encoding={f"{field.name}.list.element": "BYTE_STREAM_SPLIT" for field in vectors},
            write_statistics=False,
            **_PLAIN,
        )

    write_atomic(path, write)


def _part(number: int) -> str:
    """Lines of the request table that belong to a shard, until all are merged."""
    return f".requests-{number:05d}.parquet"


def _difference(was: Any, now: Any) -> str:
    """The first thing that differs, where it can be shown in a sentence."""
    if not (isinstance(was, Mapping) and isinstance(now, Mapping)):
        return "" if not isinstance(was, str | int | None) else f" ({was!r}, now {now!r})"
    key = next(key for key in {**was, **now} if was.get(key) != now.get(key))
    return f" ({key} was {was.get(key)!r}, now {now.get(key)!r})"


WRITERS: dict[Kind, Any] = {
    writer.kind: writer for writer in (TokenTraceWriter, IterationTraceWriter, CountsTraceWriter)
}
