"""The committed traces of each kind stay readable: format 1 is a promise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moeless.traces import CountsTrace, IterationTrace, TokenTrace, open_trace
from moeless.traces.compose import range_loads

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "traces"


@pytest.mark.parametrize(
    ("kind", "made"), [("tokens", TokenTrace), ("iterations", IterationTrace), ("counts", CountsTrace)]
)
def test_committed_traces_open_and_hold_what_they_say(kind: str, made: type) -> None:
    trace = open_trace(FIXTURES / kind, check=True)
    assert isinstance(trace, made)
    assert trace.info.kind == kind


def test_iterations_and_counts_of_the_same_passes_agree() -> None:
    iterations, counts = open_trace(FIXTURES / "iterations"), open_trace(FIXTURES / "counts")
    assert isinstance(iterations, IterationTrace)
    assert isinstance(counts, CountsTrace)
    count = iterations.num_iterations
    rows = [iterations.rows(index) for index in range(count)]
    load = range_loads(
        iterations.load_topk(),
        [r.start for r in rows],
        [r.stop for r in rows],
        np.arange(count),
        iterations.spec.E,
        count,
    )
    np.testing.assert_array_equal(load.transpose(1, 0, 2), counts.loads(0, count))
    np.testing.assert_array_equal(counts.tokens_I, [r.stop - r.start for r in rows])
