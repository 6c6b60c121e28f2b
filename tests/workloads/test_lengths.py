"""Requests replay the trace's own rows, or rows of their category, and it is said which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.contracts import Phase, Span
from moeless.errors import UserError
from moeless.workloads.arrival_series import ArrivalSeries
from moeless.workloads.lengths import join
from moeless.workloads.schedulers import Continuous


@dataclass
class Table:
    first_row: Any
    prompt_tokens: Any
    category: list[str]


def table(prompts: list[int], decodes: list[int], categories: list[str]) -> tuple[Table, int]:
    counts = np.add(prompts, decodes)
    return Table(np.cumsum(counts) - counts, np.array(prompts), categories), int(counts.sum())


TRACE, ROWS = table([3, 1, 4, 2], [2, 5, 0, 3], ["a", "b", "a", "b"])


def series(count: int, prompt: int | None = None, output: int = 1) -> ArrivalSeries:
    times = np.arange(count, dtype=float)
    if prompt is None:
        return ArrivalSeries("times", times)
    return ArrivalSeries("lengths", times, np.full(count, prompt), np.full(count, output))


def test_trace_lengths_replay_each_request_from_first_to_last_row():
    work = join(series(4), TRACE, ROWS)
    assert sorted(request.trace_request for request in work.requests) == [0, 1, 2, 3]
    for request in work.requests:
        index = request.trace_request
        assert index is not None
        assert request.prompt_tokens == TRACE.prompt_tokens[index]
        length = request.prompt_tokens + request.output_tokens - 1
        rows = work.rows([Span(request.id, 0, length, Phase.PREFILL)])
        stop = ROWS if index == 3 else TRACE.first_row[index + 1]
        assert rows.tolist() == list(range(TRACE.first_row[index], stop))
        assert request.category == TRACE.category[index]
    assert not work.resampled
    assert work.warnings == ()


def test_requests_of_the_trace_are_used_again_in_the_same_seeded_order():
    used = [request.trace_request for request in join(series(10), TRACE, ROWS, seed=3).requests]
    assert used[:4] == used[4:8]
    assert used[8:] == used[:2]
    orders = {tuple(r.trace_request for r in join(series(4), TRACE, ROWS, seed=s).requests) for s in range(20)}
    assert len(orders) > 5
    assert used[:4] == [request.trace_request for request in join(series(4), TRACE, ROWS, seed=3).requests]


def test_a_trace_of_generated_tokens_takes_its_first_row_for_the_prompt():
    generated, rows = table([0, 0], [5, 1], ["", ""])
    work = join(series(2), generated, rows)
    assert {(r.prompt_tokens, r.output_tokens) for r in work.requests} == {(1, 5), (1, 1)}
    assert len(work.warnings) == 1
    assert "no prompt rows" in work.warnings[0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 6), st.sampled_from("abc")).filter(lambda r: r[0] + r[1] > 0),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 5),
)
def test_arrival_lengths_are_met_with_rows_of_the_category_and_phase(
    rows: list[tuple[int, int, str]], prompt: int, output: int, seed: int
):
    trace, total = table([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])
    work = join(series(5, prompt, output), trace, total, lengths="arrival", seed=seed)
    assert work.resampled
    owner = np.repeat(np.arange(len(rows)), [r[0] + r[1] for r in rows])
    is_prompt = np.arange(total) - trace.first_row[owner] < trace.prompt_tokens[owner]
    for request in work.requests:
        assert (request.prompt_tokens, request.output_tokens) == (prompt, output)
        pre = work.rows([Span(request.id, 0, prompt, Phase.PREFILL)])
        post = work.rows([Span(request.id, prompt, prompt + output - 1, Phase.DECODE)])
        assert (len(pre), len(post)) == (prompt, output - 1)
        for got, phase in ((pre, True), (post, False)):
            assert all(trace.category[owner[row]] == request.category for row in got)
            mine = [o for o in range(len(rows)) if rows[o][2] == request.category]
            if any(rows[o][0 if phase else 1] for o in mine):
                assert (is_prompt[got] == phase).all()
        own = rows[request.trace_request]
        take = min(own[0], prompt)
        first = trace.first_row[request.trace_request]
        assert pre[:take].tolist() == list(range(first, first + take))
    again = join(series(5, prompt, output), trace, total, lengths="arrival", seed=seed)
    np.testing.assert_array_equal(work.row_F, again.row_F)


def test_borrowing_rows_of_the_other_phase_is_said():
    generated, rows = table([0, 0], [5, 4], ["a", "b"])
    work = join(series(3, 10, 3), generated, rows, lengths="arrival")
    assert any("no prompt rows" in warning for warning in work.warnings)


def test_rows_of_a_scheduled_iteration_follow_its_spans():
    work = join(series(4), TRACE, ROWS)
    scheduler = Continuous(work.requests, 2, token_budget=3)
    seen: dict[int, list[int]] = {request.id: [] for request in work.requests}
    now = 10.0
    while not scheduler.done:
        iteration = scheduler.next(now)
        assert iteration is not None
        rows, sources = work.rows(iteration.spans), work.sources(iteration)
        assert len(rows) == len(sources) == iteration.tokens
        np.testing.assert_array_equal(rows, work.rows(list(iteration.spans)))
        at = 0
        for span in iteration.spans:
            for row in rows[at : at + span.stop - span.start]:
                seen[span.request].append(int(row))
            assert (sources[at : at + span.stop - span.start] == iteration.rank_of_request[span.request]).all()
            at += span.stop - span.start
        scheduler.complete(iteration, now)
    assert sorted(row for rows in seen.values() for row in rows) == list(range(ROWS))


def test_lengths_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="have times only"):
        join(series(2), TRACE, ROWS, lengths="arrival")
    with pytest.raises(UserError, match="not from 'guess'"):
        join(series(2), TRACE, ROWS, lengths="guess")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no token"):
        join(series(2), Table(np.array([0]), np.array([0]), [""]), 0)
