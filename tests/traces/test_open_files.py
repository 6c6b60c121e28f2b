"""A trace may have more shards than a process may have files open."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from moeless.errors import UserError
from moeless.traces import TokenTrace, open_trace
from moeless.traces.store import OPEN_SHARDS


@contextmanager
def few_more_files(count: int) -> Iterator[None]:
    """Let this process open so many files on top of those that it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_trace_of_more_shards_than_open_files_is_read(make_tokens: Callable[..., Path]) -> None:
    path = make_tokens([(1, 0)] * 3 * OPEN_SHARDS, shard_rows=1)
    before = open_trace(path)
    assert isinstance(before, TokenTrace)
    assert len(before.info.shards) == 3 * OPEN_SHARDS
    expected = before.load_topk()
    del before
    with few_more_files(2 * OPEN_SHARDS):
        trace = open_trace(path)
        assert isinstance(trace, TokenTrace)
        assert (trace.load_topk() == expected).all()
        assert len(trace.phase_T) == len(expected)
        # any order, from several threads
        rows = np.random.default_rng(0).integers(0, len(expected), 200).tolist()
        with ThreadPoolExecutor(4) as readers:
            for row, found in zip(rows, readers.map(lambda at: trace.topk(at, at + 1), rows), strict=True):
                assert (found[0] == expected[row]).all()


def test_what_the_system_refuses_is_not_blamed_on_the_trace(
    make_tokens: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tokens([(3, 2)])

    def refuses(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(pq, "ParquetFile", refuses)
    with pytest.raises(UserError, match=r"tokens-00000\.parquet cannot be read \(.*Too many open files\)$"):
        open_trace(path)
