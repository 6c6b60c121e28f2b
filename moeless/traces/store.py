"""Opening trace folders as objects with array accessors.

Axes: T tokens (rows), L MoE layers, K experts per token, E experts, H hidden size, I iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moeless.errors import UserError
from moeless.spec import MoESpec
from moeless.traces.info import INFO_FILE, TraceInfo
from moeless.traces.requests import REQUESTS_FILE, RequestTable
from moeless.traces.router_inputs import RouterInputs
from moeless.traces.schema import Kind
from moeless.traces.shards import ShardReader, check_file


class Trace:
    """What all kinds have in common."""

    def __init__(self, path: Path, info: TraceInfo) -> None:
        self.path = path
        self.info = info
        self._reader = ShardReader(path, info)

    @property
    def spec(self) -> MoESpec:
        """The model whose routing this is."""
        return self.info.spec

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return self._reader.rows

    @cached_property
    def phase_T(self) -> NDArray[np.uint8]:
        """Phase of every row, ``contracts.Phase`` values."""
        return self._reader.scalar("phase", np.uint8)


class _RowTrace(Trace):
    """A trace whose rows are tokens."""

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
        return self._reader.vector("experts", start, stop).reshape(stop - start, self.spec.L, self.spec.K)

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
        return self._reader.vector("weights", start, stop).reshape(stop - start, self.spec.L, self.spec.K)

    def router_inputs(self, start: int, stop: int) -> NDArray[np.float32]:
        """What each gate saw in rows ``[start, stop)``, f32 ``[T, L, H]``.

        Raises:
            UserError: the trace has none.
        """
        if not self.has_router_inputs:
            raise UserError(f"{self.path} holds no router inputs; record it with `moeless trace --router-inputs`")
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"rows {start}..{stop} lie outside a trace of {self.num_rows} rows")
        return self._inputs.read(start, stop)

    @cached_property
    def _inputs(self) -> RouterInputs:
        files = tuple(entry for entry in self.info.files if entry.file.startswith("router_inputs-"))
        return RouterInputs(self.path, files, self.spec)

    @cached_property
    def token_T(self) -> NDArray[np.int32]:
        """Token ids, i32 ``[T]``, −1 where unknown."""
        return self._reader.scalar("token", np.int32)

    @cached_property
    def position_T(self) -> NDArray[np.int64]:
        """Position of each token in its request, i64 ``[T]``, −1 where unknown."""
        return self._reader.scalar("position", np.int64)


class TokenTrace(_RowTrace):
    """Routing per request, from which iterations of any batching can be composed."""

    def __init__(self, path: Path, info: TraceInfo) -> None:
        super().__init__(path, info)
        self.requests = RequestTable.read(path / REQUESTS_FILE, self.num_rows)

    @property
    def num_requests(self) -> int:
        """Requests recorded."""
        return len(self.requests)

    def rows(self, request: int) -> slice:
        """Rows of the request at that index of :attr:`requests`."""
        stop = self.requests.first_row[request + 1] if request + 1 < self.num_requests else self.num_rows
        return slice(int(self.requests.first_row[request]), int(stop))

    @cached_property
    def request_T(self) -> NDArray[np.uint32]:
        """Request id of every row."""
        return self._reader.scalar("request", np.uint32)

    @cached_property
    def rows_N(self) -> NDArray[np.int64]:
        """Rows of each request, ``[N]``."""
        return np.diff(np.append(self.requests.first_row, self.num_rows))


class IterationTrace(_RowTrace):
    """Routing per forward pass of a serving engine, replayed as recorded; sorted by (iteration, rank)."""

    @cached_property
    def iteration_T(self) -> NDArray[np.uint32]:
        """Iteration id of every row."""
        return self._reader.scalar("iteration", np.uint32)

    @cached_property
    def rank_T(self) -> NDArray[np.uint16]:
        """Rank that owned each row."""
        return self._reader.scalar("rank", np.uint16)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        ids = self.iteration_T
        return np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]])) if len(ids) else np.empty(0, np.int64)

    @property
    def num_iterations(self) -> int:
        """Distinct iterations."""
        return len(self._starts)

    def rows(self, index: int) -> slice:
        """Rows of the iteration at that index (0 to ``num_iterations``-1)."""
        stop = self._starts[index + 1] if index + 1 < self.num_iterations else self.num_rows
        return slice(int(self._starts[index]), int(stop))


class CountsTrace(Trace):
    """Tokens per expert of each forward pass, nothing finer."""

    def loads(self, start: int, stop: int) -> NDArray[np.uint32]:
        """Load of iterations ``[start, stop)``, u32 ``[I, L, E]``."""
        return self._reader.vector("load", start, stop).reshape(stop - start, self.spec.L, self.spec.E)

    @property
    def num_iterations(self) -> int:
        """Iterations recorded."""
        return self.num_rows

    @cached_property
    def iteration_I(self) -> NDArray[np.uint32]:
        """Iteration ids, ascending."""
        return self._reader.scalar("iteration", np.uint32)

    @property
    def phase_I(self) -> NDArray[np.uint8]:
        """Phase of each iteration, 255 for mixed or unknown."""
        return self.phase_T

    @cached_property
    def tokens_I(self) -> NDArray[np.int64]:
        """Tokens of each iteration, i64, −1 where unknown."""
        return self._reader.scalar("tokens", np.int64)


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
    if check:
        for entry in (*info.shards, *info.files):
            check_file(folder, entry, digest=True)
    else:
        for entry in info.files:
            check_file(folder, entry)
    trace = _CLASSES[info.kind](folder, info)
    if trace.num_rows == 0:
        raise UserError(f"the trace at {folder} holds no rows")
    if check:
        from moeless.traces.check import check_values

        check_values(trace)
    return trace


def check_new_or_unfinished(path: Path) -> None:
    """Refuse an output folder that is neither empty nor an unfinished trace.

    Raises:
        UserError: it holds something else, or a complete trace.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"cannot write {path}: it is a file, a trace is a folder")
    if not any(path.iterdir()):
        return
    if not (path / INFO_FILE).exists():
        raise UserError(f"{path} already exists and is not empty; choose another --out or remove it first")
    if TraceInfo.read(path).complete:
        raise UserError(f"{path} already holds a complete trace; choose another --out or remove it first")


_WHAT: dict[Kind, str] = {
    "tokens": "tokens (routing per request)",
    "iterations": "iterations (routing per forward pass)",
    "counts": "counts (loads only)",
}


def require_kind(trace: Trace, *kinds: Kind, command: str) -> None:
    """Refuse a trace that is not rich enough.

    Raises:
        UserError: its kind is none of ``kinds``.
    """
    if trace.info.kind not in kinds:
        needed = " or ".join(_WHAT[kind] for kind in kinds)
        raise UserError(f"{command} needs a trace of kind {needed}; {trace.path} is of kind {_WHAT[trace.info.kind]}")
