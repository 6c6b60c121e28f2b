"""One writer per kind of trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moeless.errors import UserError
from moeless.files import sha256, write_atomic
from moeless.traces.info import Shard, TraceInfo
from moeless.traces.requests import REQUESTS_FILE, RequestTable
from moeless.traces.router_inputs import write_inputs
from moeless.traces.schema import REQUESTS_SCHEMA
from moeless.traces.writer import SHARD_ROWS, ShardWriter


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

    def __init__(
        self, path: str | Path, info: TraceInfo, *, shard_rows: int = SHARD_ROWS, resume: bool = False
    ) -> None:
        if info.kind != "tokens":
            raise UserError(f"a token trace writer cannot write kind {info.kind!r}")
        self._next_request = 0
        self._requests: list[tuple[RequestRows, int]] = []
        self._inputs: list[Any] = []
        self._count = 0
        super().__init__(path, info, shard_rows=shard_rows, resume=resume)

    def _known(self) -> set[str]:
        return super()._known() | {_part(number) for number in range(len(self.info.shards))}

    def _resume(self) -> None:
        super()._resume()
        if self.info.complete:
            self._count = self.info.counts.get("requests", 0)
            return
        for number in range(len(self.info.shards)):
            part = self.path / _part(number)
            if not part.exists():
                raise UserError(f"{part} is missing, so the recording cannot be resumed; remove the folder")
            table = RequestTable.from_arrow(pq.read_table(part))
            self._count += len(table)
            self._next_request = int(table.request[-1]) + 1

    @property
    def num_requests(self) -> int:
        """Requests in whole shards and in memory."""
        return self._count + len(self._requests)

    def append(self, batch: Sequence[RequestRows]) -> None:
        """Add a batch of requests; a shard never ends inside one.

        Raises:
            UserError: shapes, ids or order break the format.
        """
        for entry in batch:
            self._append(entry)
        self._after_batch()

    def _append(self, entry: RequestRows) -> None:
        L, K, E = self.info.spec.L, self.info.spec.K, self.info.spec.E
        rows = len(entry.topk_TLK)
        if entry.request < self._next_request:
            raise UserError(f"request {entry.request} comes after {self._next_request - 1}; ids must ascend")
        if rows < 1 or not 0 <= entry.prompt_tokens <= rows:
            raise UserError(f"request {entry.request} has {rows} rows and {entry.prompt_tokens} prompt tokens")
        where = f"request {entry.request}: "
        columns: dict[str, Any] = {
            "request": np.full(rows, entry.request),
            "position": np.arange(rows),
            "phase": (np.arange(rows) >= entry.prompt_tokens).astype(np.uint8),
            "token": entry.token_T,
            "experts": self._check_vector(where + "experts", entry.topk_TLK, (rows, L, K), E),
        }
        if self.info.has_weights:
            if entry.weights_TLK is None:
                raise UserError(where + "gate weights are missing")
            columns["weights"] = check_weights(
                where, self._check_vector(where + "weights", entry.weights_TLK, (rows, L, K), None)
            )
        if self.info.router_input_dtype is not None:
            if entry.input_TLH is None or tuple(entry.input_TLH.shape) != (rows, L, self.info.spec.hidden_size):
                raise UserError(where + "router inputs are missing or of another shape")
            self._inputs.append(entry.input_TLH)
        self._add(columns, rows)
        self._requests.append((entry, self.rows + self._pending_rows - rows))
        self._next_request = entry.request + 1

    def _before_shard(self, number: int) -> None:
        table = RequestTable.build(
            [entry.request for entry, _ in self._requests],
            [first for _, first in self._requests],
            [entry.prompt_tokens for entry, _ in self._requests],
            [entry.output_tokens for entry, _ in self._requests],
            [entry.category for entry, _ in self._requests],
            [entry.source_id for entry, _ in self._requests],
        )
        write_atomic(self.path / _part(number), table.write)
        self._count += len(self._requests)
        self._requests = []
        if self.info.router_input_dtype is not None:
            import torch

            path = self.path / f"router_inputs-{number:05d}.safetensors"
            inputs = torch.cat(self._inputs)
            write_inputs(path, inputs)
            self._files.append(Shard(path.name, len(inputs), path.stat().st_size, sha256(path)))
            self._inputs = []

    def _last_files(self) -> Sequence[Shard]:
        path = self.path / REQUESTS_FILE

        def merge(partial: Path) -> None:
            with pq.ParquetWriter(
                partial, REQUESTS_SCHEMA, use_dictionary=False, compression="zstd", compression_level=1
            ) as out:
                for number in range(len(self.info.shards)):
                    out.write_table(pq.read_table(self.path / _part(number)))

        write_atomic(path, merge)
        return [Shard(path.name, self._count, path.stat().st_size, sha256(path))]

    def _totals(self) -> dict[str, int]:
        return {"rows": self.rows, "requests": self._count}


class IterationTraceWriter(ShardWriter):
    """Writes a trace of kind *iterations*; rows ascend by (iteration, rank)."""

    def __init__(self, path: str | Path, info: TraceInfo, *, shard_rows: int = SHARD_ROWS) -> None:
        if info.kind != "iterations":
            raise UserError(f"an iteration trace writer cannot write kind {info.kind!r}")
        self._last = (-1, -1)
        self._iterations = 0
        super().__init__(path, info, shard_rows=shard_rows)

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
        L, K, E = self.info.spec.L, self.info.spec.K, self.info.spec.E
        if (iteration, rank) <= self._last:
            raise UserError(f"iteration {iteration}, rank {rank} comes after {self._last}; they must ascend")
        rows = len(topk_TLK)
        if not rows:
            return
        where = f"iteration {iteration}, rank {rank}: "
        columns: dict[str, Any] = {
            "iteration": np.full(rows, iteration),
            "rank": np.full(rows, rank),
            "position": position_T,
            "phase": np.broadcast_to(np.asarray(phase_T), (rows,)),
            "token": token_T,
            "experts": self._check_vector(where + "experts", topk_TLK, (rows, L, K), E),
        }
        if self.info.has_weights:
            columns["weights"] = check_weights(
                where, self._check_vector(where + "weights", weights_TLK, (rows, L, K), None)
            )
        self._add(columns, rows)
        self._iterations += iteration != self._last[0]
        self._last = (iteration, rank)
        self._after_batch()

    def _totals(self) -> dict[str, int]:
        return {"rows": self.rows, "iterations": self._iterations}


class CountsTraceWriter(ShardWriter):
    """Writes a trace of kind *counts*."""

    def __init__(self, path: str | Path, info: TraceInfo, *, shard_rows: int = 4096) -> None:
        if info.kind != "counts":
            raise UserError(f"a counts trace writer cannot write kind {info.kind!r}")
        self._last = -1
        super().__init__(path, info.with_(has_weights=False), shard_rows=shard_rows)

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
        load = self._check_vector("load", load_ILE, (count, spec.L, spec.E), 2**32)
        columns = {
            "iteration": iteration,
            "phase": np.broadcast_to(np.asarray(phase_I), (count,)),
            "tokens": tokens_I,
            "load": load,
        }
        self._add(columns, count)
        self._last = int(iteration[-1])
        self._after_batch()

    def _totals(self) -> dict[str, int]:
        return {"rows": self.rows, "iterations": self.rows}


def check_weights(where: str, weights: NDArray[Any]) -> NDArray[np.float16]:
    """Gate weights as float16.

    Raises:
        UserError: a weight is not finite, or too large for float16.
    """
    if weights.dtype.kind != "f":
        raise UserError(f"{where}weights must be floating-point numbers, got {weights.dtype}")
    with np.errstate(over="ignore"):
        half = weights.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"{where}weights must be finite and fit float16")
    return half


def _part(number: int) -> str:
    return f".requests-{number:05d}.parquet"
