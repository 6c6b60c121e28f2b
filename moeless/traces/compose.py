"""Rows and loads of iterations composed from a token trace.

Compiled, because a simulator composes millions of layer iterations.
Axes: T rows, N spans, L layers, S source ranks, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import Span
from moeless.errors import UserError
from moeless.jit import njit
from moeless.traces.store import TokenTrace


@njit(cache=True, nogil=True)
def _count_rows(topk_TLK, rows_T, source_T, load_LSE):  # type: ignore[no-untyped-def]
    layers, width, experts, bad = topk_TLK.shape[1], topk_TLK.shape[2], load_LSE.shape[2], 0
    for index in range(rows_T.shape[0]):
        row, source = rows_T[index], source_T[index]
        for layer in range(layers):
            for k in range(width):
                expert = topk_TLK[row, layer, k]
                if expert < experts:
                    load_LSE[layer, source, expert] += 1
                else:
                    bad += 1
    return bad


@njit(cache=True, nogil=True)
def _count_ranges(topk_TLK, start_N, stop_N, source_N, load_LSE):  # type: ignore[no-untyped-def]
    layers, width, experts, bad = topk_TLK.shape[1], topk_TLK.shape[2], load_LSE.shape[2], 0
    for index in range(start_N.shape[0]):
        source = source_N[index]
        for row in range(start_N[index], stop_N[index]):
            for layer in range(layers):
                for k in range(width):
                    expert = topk_TLK[row, layer, k]
                    if expert < experts:
                        load_LSE[layer, source, expert] += 1
                    else:
                        bad += 1
    return bad


def _ids(topk_TLK: NDArray[Any]) -> NDArray[np.uint16]:
    topk = np.ascontiguousarray(topk_TLK, np.uint16)
    if topk.ndim != 3:
        raise UserError(f"top-k ids must have axes (token, layer, k), got shape {topk.shape}")
    return topk


def _refuse(bad: int, E: int) -> None:
    if bad:
        raise UserError(f"{bad} expert ids lie outside 0..{E - 1}")


def span_rows(trace: TokenTrace, spans: Sequence[Span]) -> NDArray[np.int64]:
    """Rows of the given spans in order, i64 ``[T]``.

    A span's ``request`` is an index into ``trace.requests``.

    Raises:
        UserError: a span reaches beyond its request's rows.
    """
    first, length = trace.requests.first_row, trace.rows_N
    parts = []
    for span in spans:
        if not 0 <= span.request < len(first):
            raise UserError(f"the trace has requests 0 to {len(first) - 1}, a span asks for {span.request}")
        if not 0 <= span.start <= span.stop <= length[span.request]:
            raise UserError(
                f"a span asks for positions {span.start} to {span.stop} of request {span.request}, "
                f"of which the trace holds {length[span.request]}"
            )
        parts.append(np.arange(first[span.request] + span.start, first[span.request] + span.stop))
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)


def span_loads(
    topk_TLK: NDArray[Any], rows_T: NDArray[Any], source_T: NDArray[Any], E: int, S: int
) -> NDArray[np.int64]:
    """Tokens per layer, source rank and expert of the given rows, i64 ``[L, S, E]``.

    ``source_T`` holds the source rank of each row.

    Raises:
        UserError: a row, rank or expert id is out of range, or the two arrays differ in length.
    """
    topk = _ids(topk_TLK)
    rows, source = np.ascontiguousarray(rows_T, np.int64), np.ascontiguousarray(source_T, np.int64)
    if rows.shape != source.shape or rows.ndim != 1:
        raise UserError(f"rows and source ranks must be of one length, got {rows.shape} and {source.shape}")
    if len(rows) and (rows.min() < 0 or rows.max() >= len(topk)):
        raise UserError(f"rows must lie in 0..{len(topk) - 1}")
    if len(source) and (source.min() < 0 or source.max() >= S):
        raise UserError(f"source ranks must lie in 0..{S - 1}")
    load = np.zeros((topk.shape[1], S, E), np.int64)
    _refuse(_count_rows(topk, rows, source, load), E)
    return load


def range_loads(
    topk_TLK: NDArray[Any],
    start_N: NDArray[Any],
    stop_N: NDArray[Any],
    source_N: NDArray[Any],
    E: int,
    S: int,
) -> NDArray[np.int64]:
    """Like :func:`span_loads` for whole row ranges ``[start, stop)``, one source rank each; the fastest form.

    Raises:
        UserError: a range or rank is out of range, or the arrays differ in length.
    """
    topk = _ids(topk_TLK)
    start, stop, source = (np.ascontiguousarray(values, np.int64) for values in (start_N, stop_N, source_N))
    if not (start.shape == stop.shape == source.shape) or start.ndim != 1:
        raise UserError("starts, stops and source ranks of row ranges must be of one length")
    if len(start) and (start.min() < 0 or (stop < start).any() or stop.max() > len(topk)):
        raise UserError(f"row ranges must ascend and lie in 0..{len(topk)}")
    if len(source) and (source.min() < 0 or source.max() >= S):
        raise UserError(f"source ranks must lie in 0..{S - 1}")
    load = np.zeros((topk.shape[1], S, E), np.int64)
    _refuse(_count_ranges(topk, start, stop, source, load), E)
    return load


def total_load(topk_TLK: NDArray[Any], E: int) -> NDArray[np.int64]:
    """Tokens per layer and expert over all rows, i64 ``[L, E]``."""
    topk = _ids(topk_TLK)
    one = np.zeros(1, np.int64)
    return range_loads(topk, one, one + len(topk), one, E, 1)[:, 0]
