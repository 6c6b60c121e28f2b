"""What does not fit into memory goes through a scratch file, which has its room before anything is written."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from moeless.errors import RunFailed
from moeless.predictors.trace_rows import scratch_array

SHAPE, KIND = (1000, 1000), np.dtype(np.uint16)


def test_a_scratch_array_is_reserved_as_a_whole_and_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reserved: list[tuple[int, int]] = []
    reserve = os.posix_fallocate

    def noted(handle: int, start: int, size: int) -> None:
        reserve(handle, start, size)
        reserved.append((start, size))

    monkeypatch.setattr(os, "posix_fallocate", noted)
    array = scratch_array(SHAPE, KIND)
    assert reserved == [(0, 2_000_000)]
    assert list(tmp_path.iterdir()) == []
    assert (array.shape, array.dtype) == (SHAPE, KIND)
    array[:] = 7
    assert int(array.sum()) == 7_000_000


def test_a_full_folder_for_temporary_files_ends_in_a_sentence_with_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr("moeless.predictors.trace_rows.free_bytes", lambda _: 1_250_000_000)
    says = rf"2\.00 GB of scratch space are needed in {tmp_path}, which has 1\.25 GB free \(No space.*TMPDIR$"
    with pytest.raises(RunFailed, match=says):
        scratch_array((1000, 1000, 1000), KIND)


def test_no_folder_for_temporary_files_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent/folder")
    with pytest.raises(RunFailed, match=r"no folder takes temporary files .*; name one in TMPDIR"):
        scratch_array(SHAPE, KIND)
