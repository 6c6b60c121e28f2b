"""Importers hold a request and a batch of rows, not the file."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moeless.spec import MoESpec
from moeless.traces.importers import npz, parquet
from moeless.traces.importers.npz_stream import open_npz

REQUESTS, ROWS = 300, 1000


def consumed(requests: Iterable[Any], allocated: Callable[[], int]) -> tuple[np.ndarray, int]:
    """Sum of the ids of each request, and the most that was allocated meanwhile."""
    sums, most = [], 0
    for request in requests:
        sums.append(int(request.topk_TLK.sum()))
        most = max(most, allocated())
    return np.array(sums), most


@pytest.fixture
def topk_NTLK(spec: MoESpec) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, spec.E, (REQUESTS, ROWS, spec.L, spec.K), np.int64)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_file_is_read_request_by_request(
    tmp_path: Path, spec: MoESpec, topk_NTLK: np.ndarray, save: Callable[..., None]
) -> None:
    experts = topk_NTLK.reshape(-1, spec.L, spec.K)
    save(tmp_path / "r.npz", experts=experts, probs=experts.astype(np.float64), offsets=np.arange(REQUESTS + 1) * ROWS)
    with open_npz(tmp_path / "r.npz", "") as archive:
        arrays = npz._open(tmp_path / "r.npz", archive)
        tracemalloc.start()
        sums, most = consumed(npz._requests(tmp_path / "r.npz", arrays), lambda: tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    np.testing.assert_array_equal(sums, topk_NTLK.sum(axis=(1, 2, 3)))
    assert most < experts.nbytes / 10


@pytest.mark.parametrize("row_group", [5000, REQUESTS * ROWS])
def test_a_parquet_file_is_read_batch_by_batch(
    tmp_path: Path, spec: MoESpec, topk_NTLK: np.ndarray, row_group: int
) -> None:
    flat = pa.array(topk_NTLK.reshape(-1))
    table = pa.table(
        {
            "request": np.repeat(np.arange(REQUESTS), ROWS),
            "experts": pa.FixedSizeListArray.from_arrays(flat, spec.L * spec.K),
        }
    )
    pq.write_table(table, tmp_path / "r.parquet", row_group_size=row_group, use_dictionary=False)
    before = pa.total_allocated_bytes()
    with pq.ParquetFile(tmp_path / "r.parquet", buffer_size=parquet._BUFFER_BYTES) as file:
        requests = parquet.read_requests(tmp_path / "r.parquet", file, spec)
        sums, most = consumed(requests, lambda: pa.total_allocated_bytes() - before)
    np.testing.assert_array_equal(sums, topk_NTLK.sum(axis=(1, 2, 3)))
    # a batch of rows and what is read ahead of each column
    assert most < topk_NTLK.nbytes / 2
