"""Every value of an opened trace against the format, a row group at a time."""

from __future__ import annotations

import numpy as np

from moeless.errors import UserError
from moeless.traces.store import CountsTrace, IterationTrace, TokenTrace

_STEP = 16_384


def check_values(trace: TokenTrace | IterationTrace | CountsTrace) -> None:
    """Read the whole trace and check ids, order, phases, weights, totals.

    Raises:
        UserError: names the first thing that is wrong.
    """
    if isinstance(trace, CountsTrace):
        _check_counts(trace)
        return
    if isinstance(trace, TokenTrace):
        _check_requests(trace)
    else:
        _check_iterations(trace)
    for start in range(0, trace.num_rows, _STEP):
        stop = min(start + _STEP, trace.num_rows)
        ids = np.sort(trace.topk(start, stop), axis=-1)
        twice = (ids[..., 1:] == ids[..., :-1]).any(axis=(1, 2))
        if twice.any():
            row = start + int(np.flatnonzero(twice)[0])
            raise UserError(f"{trace.path}: row {row} names an expert twice in one layer's top-k")
        if trace.has_weights and not np.isfinite(trace.weights(start, stop)).all():
            raise UserError(f"{trace.path}: gate weights in rows {start} to {stop - 1} are not all finite")
        if trace.has_router_inputs and not np.isfinite(trace.router_inputs(start, stop)).all():
            raise UserError(f"{trace.path}: router inputs in rows {start} to {stop - 1} are not all finite")
    total = trace.info.counts.get("rows")
    if total != trace.num_rows:
        raise UserError(f"{trace.path}: trace.json counts {total} rows, the shards hold {trace.num_rows}")


def _check_requests(trace: TokenTrace) -> None:
    table, where = trace.requests, str(trace.path)
    owner = np.repeat(np.arange(len(table)), trace.rows_N)
    position = np.arange(trace.num_rows) - table.first_row[owner]
    if (trace.request_T != table.request[owner]).any():
        raise UserError(f"{where}: rows do not follow the order of requests.parquet")
    if (trace.position_T != position).any():
        raise UserError(f"{where}: positions of a request do not count 0, 1, 2, ...")
    if (trace.phase_T != (position >= table.prompt_tokens[owner])).any():
        raise UserError(f"{where}: phases do not agree with the requests' prompt tokens")


def _check_iterations(trace: IterationTrace) -> None:
    key = trace.iteration_T.astype(np.int64) * 65536 + trace.rank_T
    if (np.diff(key) < 0).any():
        raise UserError(f"{trace.path}: rows are not sorted by iteration and rank")
    if not np.isin(trace.phase_T, (0, 1, 255)).all():
        raise UserError(f"{trace.path}: a phase is none of 0, 1, 255")


def _check_counts(trace: CountsTrace) -> None:
    if (np.diff(trace.iteration_I.astype(np.int64)) < 1).any():
        raise UserError(f"{trace.path}: iterations do not ascend")
    if not np.isin(trace.phase_I, (0, 1, 255)).all():
        raise UserError(f"{trace.path}: a phase is none of 0, 1, 255")
    K = trace.spec.K
    for start in range(0, trace.num_iterations, 256):
        stop = min(start + 256, trace.num_iterations)
        sums = trace.loads(start, stop).sum(axis=2, dtype=np.int64)
        tokens = trace.tokens_I[start:stop]
        # engines that drop tokens count fewer assignments, never more
        over = (tokens >= 0) & (sums > tokens[:, None] * K).any(axis=1)
        if over.any():
            index = start + int(np.flatnonzero(over)[0])
            raise UserError(f"{trace.path}: iteration {index} counts more than tokens x top-{K} assignments")
