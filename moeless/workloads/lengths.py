"""Joins arrivals with a routing trace: who replays which rows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import Int32Array, IntArray, Iteration, Request, Span
from moeless.errors import UserError
from moeless.workloads.arrival_series import ArrivalSeries
from moeless.workloads.spans import span_columns

Lengths = Literal["trace", "arrival"]


class TraceRequests(Protocol):
    """What is needed of a trace's table of requests; arrays of one length."""

    @property
    def first_row(self) -> NDArray[Any]: ...
    @property
    def prompt_tokens(self) -> NDArray[Any]: ...
    @property
    def category(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival, and the trace row of each of their positions.

    Attributes:
        requests: their ids are 0, 1, 2, ...
        resampled: rows were drawn from other requests of the category to reach the arrivals' lengths.
        warnings: sentences about what the trace could not give.
        base_N: row (or index into ``row_F``) of each request's position 0.
        row_F: rows of all requests, one after the other; None where a request's rows are consecutive.
    """

    requests: tuple[Request, ...]
    resampled: bool
    warnings: tuple[str, ...]
    base_N: IntArray
    row_F: NDArray[np.uint32] | None = None

    def rows(self, spans: Sequence[Span]) -> IntArray:
        """Trace rows of the spans' positions, in order of the spans, ``[T]``."""
        request_N, start_N, stop_N, _ = span_columns(spans)
        index = _ranges(self.base_N[request_N] + start_N, stop_N - start_N)
        return index if self.row_F is None else self.row_F[index].astype(np.int64)

    def sources(self, iteration: Iteration) -> Int32Array:
        """Owner rank of each token of the iteration, in the order of ``rows``, ``[T]``."""
        rank = iteration.rank_of_request
        ranks = [rank[span.request] for span in iteration.spans]
        counts = [span.stop - span.start for span in iteration.spans]
        return np.repeat(np.array(ranks, np.int32), counts)


def _ranges(start_N: IntArray, count_N: IntArray) -> IntArray:
    """start, start + 1, ... for each pair, one after the other."""
    ends = np.cumsum(count_N)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(start_N - (ends - count_N), count_N) + np.arange(total)


def join(
    series: ArrivalSeries, requests: TraceRequests, num_rows: int, *, lengths: Lengths = "trace", seed: int = 0
) -> Workload:
    """One request per arrival, replaying the trace's requests in a seeded order, over again where they run out.

    Args:
        requests, num_rows: the trace's table of requests, and its number of rows; a request owns the rows from
            its ``first_row`` to the next one's.
        lengths: ``trace`` takes times from the arrivals and lengths from the trace. A request without prompt
            rows is replayed with its first row as a prompt of one token. ``arrival`` takes lengths from the
            arrivals too: prompt and decode rows are those of the trace's request, cut, or followed by those of
            other requests of its category, in an order drawn for each request.

    Raises:
        UserError: the trace has no rows, or the arrivals have no lengths that ``arrival`` could take.
    """
    if lengths not in ("trace", "arrival"):
        raise UserError(f"lengths come from 'trace' or from 'arrival', not from {lengths!r}")
    first = np.asarray(requests.first_row, np.int64)
    count = np.diff(np.append(first, num_rows))
    prompt = np.asarray(requests.prompt_tokens, np.int64)
    usable = np.flatnonzero(count > 0)
    if len(usable) == 0:
        raise UserError("the trace holds no token that could be replayed")
    chosen = usable[np.random.default_rng((seed, 0x10D5)).permutation(len(usable))]
    chosen = chosen[np.arange(len(series)) % len(chosen)]
    categories = [requests.category[index] or "" for index in chosen.tolist()]
    if lengths == "trace":
        return _by_trace(series, chosen, first, count, prompt, categories)
    if series.prompt_N is None or series.output_N is None:
        raise UserError(
            f"the arrivals {series.name} have times only; take lengths from the trace, or use azure-like or a request "
            "trace"
        )
    return _by_arrival(series, chosen, first, count, prompt, requests.category, categories, seed)


def _by_trace(
    series: ArrivalSeries, chosen: IntArray, first: IntArray, count: IntArray, prompt: IntArray, categories: list[str]
) -> Workload:
    warnings = []
    without = int((prompt[np.unique(chosen)] == 0).sum())
    if without:
        warnings.append(
            f"{without} requests of the trace have no prompt rows: their first row stands for a prompt of one token, "
            "so prefill is not represented"
        )
    used = np.minimum(np.maximum(prompt[chosen], 1), count[chosen])
    columns = zip(
        series.time_N.tolist(),
        used.tolist(),
        (count[chosen] - used + 1).tolist(),
        chosen.tolist(),
        categories,
        strict=True,
    )
    made = tuple(Request(index, *rest) for index, rest in enumerate(columns))
    return Workload(made, False, tuple(warnings), first[chosen])


def _by_arrival(
    series: ArrivalSeries,
    chosen: IntArray,
    first: IntArray,
    count: IntArray,
    prompt: IntArray,
    category_of: Sequence[str],
    categories: list[str],
    seed: int,
) -> Workload:
    assert series.prompt_N is not None
    assert series.output_N is not None
    runs = {0: (first, prompt), 1: (first + prompt, count - prompt)}
    pools: dict[tuple[str, int], IntArray] = {}
    members: dict[str, list[int]] = {}
    for index, category in enumerate(category_of):
        members.setdefault(category or "", []).append(index)
    borrowed = set()
    for category in set(categories):
        inside = np.array(members[category], np.int64)
        for phase in (0, 1):
            pools[category, phase] = inside[runs[phase][1][inside] > 0]
            if len(pools[category, phase]) == 0:
                borrowed.add(("prompt", "decode")[phase])
    wanted = np.stack([series.prompt_N, series.output_N - 1], axis=1)
    ends = np.cumsum(wanted.sum(axis=1))
    rows = np.empty(int(ends[-1]), np.uint32)
    made, at = [], 0
    for index, (time, own, category) in enumerate(
        zip(series.time_N.tolist(), chosen.tolist(), categories, strict=True)
    ):
        rng = np.random.default_rng((seed, 0x2E5A, index))
        for phase in (0, 1):
            need = int(wanted[index, phase])
            # a category without rows of this phase lends those of the other
            source = phase if len(pools[category, phase]) else 1 - phase
            _fill(rows[at : at + need], own, pools[category, source], *runs[source], rng)
            at += need
        made.append(Request(index, time, int(wanted[index, 0]), int(wanted[index, 1]) + 1, own, category))
    names = " and ".join(sorted(borrowed))
    warnings = ["token routing is resampled within categories to reach the arrivals' lengths"]
    if borrowed:
        warnings.append(f"some categories of the trace have no {names} rows: rows of the other phase stand for them")
    return Workload(tuple(made), True, tuple(warnings), ends - wanted.sum(axis=1), rows)


def _fill(
    out: NDArray[np.uint32], own: int, pool: IntArray, first: IntArray, count: IntArray, rng: np.random.Generator
) -> None:
    """Rows of request ``own``, then whole runs of the pool's requests in random order, cut to fit."""
    at, place = 0, 0
    order = pool[:0]
    follow = own if count[own] > 0 else -1
    while at < len(out):
        if follow < 0:
            if place == len(order):
                order, place = rng.permutation(pool), 0
            follow = int(order[place])
            place += 1
        step = min(int(count[follow]), len(out) - at)
        out[at : at + step] = np.arange(first[follow], first[follow] + step, dtype=np.uint32)
        at += step
        follow = -1
