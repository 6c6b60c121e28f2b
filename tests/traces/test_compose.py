"""Loads of composed iterations are exact counts of the tokens that make them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.contracts import Phase, Span
from moeless.errors import UserError
from moeless.traces import open_trace
from moeless.traces.compose import range_loads, span_loads, span_rows, total_load


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(0, 10_000))
def test_span_loads_count_every_assignment_once(tokens: int, L: int, E: int, S: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    K = int(rng.integers(1, E + 1))
    topk = rng.integers(0, E, (tokens, L, K)).astype(np.uint16)
    rows, source = rng.integers(0, tokens, 2 * tokens), rng.integers(0, S, 2 * tokens)
    load = span_loads(topk, rows, source, E, S)
    expected = np.zeros((L, S, E), np.int64)
    for row, rank in zip(rows, source, strict=True):
        for layer in range(L):
            for expert in topk[row, layer]:
                expected[layer, rank, expert] += 1
    np.testing.assert_array_equal(load, expected)
    cuts = np.sort(rng.integers(0, tokens + 1, 4))
    start, stop, ranks = cuts[:-1], cuts[1:], rng.integers(0, S, 3)
    by_rows = span_loads(topk, np.arange(cuts[0], cuts[-1]), np.repeat(ranks, stop - start), E, S)
    np.testing.assert_array_equal(range_loads(topk, start, stop, ranks, E, S), by_rows)


def test_span_rows_follow_requests_and_positions(token_trace: Path) -> None:
    trace = open_trace(token_trace)
    spans = [Span(3, 2, 5, Phase.DECODE), Span(0, 0, 7, Phase.PREFILL)]
    rows = span_rows(trace, spans)
    assert trace.request_T[rows].tolist() == [3] * 3 + [0] * 7
    assert trace.position_T[rows].tolist() == [2, 3, 4, 0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(UserError, match="positions 0 to 3 of request 1"):
        span_rows(trace, [Span(1, 0, 3, Phase.PREFILL)])


def test_total_load_is_the_sum_over_rows(token_trace: Path) -> None:
    trace = open_trace(token_trace)
    topk = trace.load_topk()
    load = total_load(topk, trace.spec.E)
    assert (load.sum(axis=1) == len(topk) * trace.spec.K).all()
    np.testing.assert_array_equal(load[1], np.bincount(topk[:, 1].ravel(), minlength=trace.spec.E))


def test_ids_and_rows_out_of_range_are_refused(random_topk: Callable, spec) -> None:
    topk = random_topk(np.random.default_rng(0), 5, spec)
    with pytest.raises(UserError, match="expert ids lie outside"):
        span_loads(topk, np.arange(5), np.zeros(5, int), 4, 1)
    with pytest.raises(UserError, match="rows must lie"):
        span_loads(topk, np.array([5]), np.array([0]), 6, 1)
    with pytest.raises(UserError, match="source ranks"):
        span_loads(topk, np.array([0]), np.array([1]), 6, 1)
