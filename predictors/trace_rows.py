"""A token trace as fitting and evaluation read it: rows, their loads, and samples of whole requests.

Axes: T tokens, L MoE layers, E experts, K experts per token, H hidden size.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import FloatArray, IntArray
from moeless.errors import RunFailed
from moeless.machine import free_bytes
from moeless.predictors.base import Reads
from moeless.spec import MoESpec

if TYPE_CHECKING:
    from moeless.traces import TokenTrace

#: Bytes of gate inputs that are kept in memory between epochs; larger samples are read again.
CACHE_BYTES = 2**30
BLOCK_TOKENS = 2048
#: Tokens that are read or counted at once.
STREAM_TOKENS = 65_536


def scratch_array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array in an unnamed temporary file: the system can free its memory, and it ends with the process.

    Raises:
        RunFailed: there is no room for it, or no folder for temporary files.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    wanted = f"{size / 1e9:,.2f} GB of scratch space are needed"
    try:
        folder = Path(tempfile.gettempdir())
        file = tempfile.TemporaryFile(prefix="moeless-", dir=folder)  # noqa: SIM115
    except OSError as error:
        raise RunFailed(f"{wanted}, but no folder takes temporary files ({error}); name one in TMPDIR") from error
    try:
        # without room, writing to a mapped page would kill the process
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        file.close()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunFailed(
            f"{wanted} in {folder}, which has {free_bytes(folder) / 1e9:,.2f} GB free ({error.strerror}); name a "
            "folder with more room in TMPDIR"
        ) from error
    return np.memmap(file, dtype, "r+", shape=shape)


class Rows:
    """Expert ids, phases, token ids and gate inputs of a trace of kind tokens."""

    def __init__(self, trace: TokenTrace) -> None:
        self.trace = trace
        self.spec: MoESpec = trace.spec
        self.first_N = np.asarray(trace.requests.first_row, np.int64)
        self.rows_N = np.diff(np.append(self.first_N, trace.num_rows))

    @cached_property
    def topk_TLK(self) -> NDArray[np.uint16]:
        """Expert ids of all rows, in a scratch file if the trace is large."""
        shape = (self.trace.num_rows, self.spec.L, self.spec.K)
        if 2 * int(np.prod(shape)) <= CACHE_BYTES:
            return self.trace.load_topk()
        column: NDArray[np.uint16] = scratch_array(shape, np.dtype(np.uint16))
        for start in range(0, shape[0], STREAM_TOKENS):
            stop = min(start + STREAM_TOKENS, shape[0])
            column[start:stop] = self.trace.topk(start, stop)
        return column

    @cached_property
    def phase_T(self) -> NDArray[np.uint8]:
        """Phase of all rows."""
        return np.asarray(self.trace.phase_T, np.uint8)

    @cached_property
    def token_T(self) -> NDArray[np.int32] | None:
        """Token ids of all rows; None if the trace holds none."""
        token_T = np.asarray(self.trace.token_T, np.int32)
        return token_T if len(token_T) and bool((token_T >= 0).any()) else None

    def of(self, requests: IntArray) -> IntArray:
        """Row numbers of those requests, request after request, ``[T]``."""
        count = self.rows_N[requests]
        offset = np.repeat(self.first_N[requests] - np.cumsum(count) + count, count)
        return offset + np.arange(int(count.sum()))

    def share_LE(self, requests: IntArray) -> FloatArray:
        """Mean load share of those requests' rows, ``[L, E]``; rows sum to 1."""
        load_LE = np.zeros((self.spec.L, self.spec.E))
        for part in np.array_split(requests, max(1, int(self.rows_N[requests].sum()) // STREAM_TOKENS)):
            ids_TLK = self.topk_TLK[self.of(part)] + np.arange(self.spec.L)[:, None] * self.spec.E
            load_LE += np.bincount(ids_TLK.ravel(), minlength=load_LE.size).reshape(load_LE.shape)
        return np.asarray(load_LE / load_LE.sum(1, keepdims=True))

    def load_IE(self, rows_I: Sequence[IntArray], layer: int) -> IntArray:
        """Loads ``[I, E]`` of a layer in iterations with those rows, in tokens."""
        topk_TK = self.topk_TLK[:, layer]
        return np.stack([np.bincount(topk_TK[row_T].ravel(), minlength=self.spec.E) for row_T in rows_I])

    def found(self, forecast_TK: IntArray, row_T: IntArray, layer: int) -> FloatArray:
        """Top-k recall ``[T]``: the share of the experts that each row chose in a layer and that were forecast."""
        true_TK = self.topk_TLK[row_T, layer].astype(np.int64)
        return np.asarray((true_TK[:, :, None] == forecast_TK[:, None, :]).any(2).mean(1))

    def inputs(self, row_T: IntArray) -> NDArray[np.float32]:
        """Gate inputs of those rows, f32 ``[T, L, H]``; runs of consecutive rows are read at once."""
        out = np.empty((len(row_T), self.spec.L, self.spec.hidden_size), np.float32)
        # rows of whole requests are long runs, which are copied without an index
        ends = np.append(np.flatnonzero(np.diff(row_T) != 1) + 1, len(row_T))
        starts = np.concatenate([[0], ends[:-1]])
        if len(ends) <= 1 + len(row_T) // 16:
            for start, stop in zip(starts.tolist(), ends.tolist(), strict=True):
                low = int(row_T[start]) if stop > start else 0
                out[start:stop] = self.trace.router_inputs(low, low + stop - start)
            return out
        order = np.argsort(row_T, kind="stable")
        ascending = row_T[order]
        # gaps of a few rows are cheaper to read than to skip
        cut = np.flatnonzero(np.diff(ascending) > 64) + 1
        for part in np.split(np.arange(len(row_T)), cut):
            if len(part):
                low, high = int(ascending[part[0]]), int(ascending[part[-1]]) + 1
                out[order[part]] = self.trace.router_inputs(low, high)[ascending[part] - low]
        return out


@dataclass(frozen=True)
class Block:
    """Some tokens: gate inputs ``[T, L, H]`` or expert ids ``[T, L, K]`` to read, and the experts chosen."""

    input_TLX: NDArray[Any]
    topk_TLK: NDArray[np.int64]


class Sample:
    """Tokens of whole requests, read in blocks; a small sample stays in memory.

    Args:
        requests: the requests; a random part of them if they have more than ``max_tokens`` tokens.
        reads: what the blocks hold.
    """

    def __init__(self, rows: Rows, requests: IntArray, reads: Reads, max_tokens: int, seed: int) -> None:
        self.rows, self._reads = rows, reads
        order = np.random.default_rng(seed).permutation(requests)
        ends = np.cumsum(rows.rows_N[order])
        taken = order[: int(np.searchsorted(ends, max_tokens)) + 1]
        self.requests = np.sort(taken)
        self.row_T = rows.of(taken)[: max(1, max_tokens)]
        width = rows.spec.hidden_size * 4 if reads == "router_inputs" else rows.spec.K * 8
        self._few, self._cache = len(self.row_T) * rows.spec.L * width <= CACHE_BYTES, dict[int, Block]()

    @property
    def tokens(self) -> int:
        """Tokens of the sample."""
        return len(self.row_T)

    def block(self, row_T: IntArray) -> Block:
        """Read those rows."""
        topk_TLK = self.rows.topk_TLK[row_T].astype(np.int64)
        return Block(self.rows.inputs(row_T) if self._reads == "router_inputs" else topk_TLK, topk_TLK)

    def blocks(self, rng: np.random.Generator | None = None, size: int = BLOCK_TOKENS) -> Iterator[Block]:
        """All tokens once, in blocks of ``size``; with ``rng``, the blocks come in random order."""
        starts = np.arange(0, self.tokens, size)
        if rng is not None:
            starts = rng.permutation(starts)
        if self._few:
            # a block is kept by its start: it has the size with which it was read first
            for start in starts.tolist():
                if start not in self._cache:
                    self._cache[start] = self.block(self.row_T[start : start + size])
                yield self._cache[start]
            return
        # the next block is read while this one is worked on
        with ThreadPoolExecutor(1, "moeless-blocks") as reader:
            coming = None
            for start in starts.tolist():
                read, coming = coming, reader.submit(self.block, self.row_T[start : start + size])
                if read is not None:
                    yield read.result()
            if coming is not None:
                yield coming.result()
