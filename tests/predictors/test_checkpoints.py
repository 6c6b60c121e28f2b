"""Fits that were killed: they go on where they stood, and end as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moeless.errors import UserError
from moeless.predictors import trace_rows
from moeless.predictors.gradient_fit import HeadFit
from moeless.predictors.trace_rows import Rows
from moeless.predictors.train_evaluate import FitJob, run_fit

OPTIONS = {
    "layer_aware": {"threshold": 0.99, "epochs": 4, "batch_tokens": 128},
    "from_scratch": {"hidden": 8, "epochs": 3, "batch_tokens": 128, "search_epochs": 1},
    "blend": {"part": "transition", "epochs": 3, "batch_tokens": 64, "windows": 4},
}


def files(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


@pytest.mark.parametrize(("method", "survived"), [("layer_aware", 2), ("from_scratch", 4), ("blend", 1)])
def test_a_killed_fit_goes_on_and_ends_in_the_same_bytes(made, tmp_path, monkeypatch, method, survived):
    job = FitJob(made.path, method, (1, 2), options=OPTIONS[method], device="cpu")
    run_fit(job, tmp_path / "whole")
    done = 0
    end_epoch = HeadFit.end_epoch

    def killed(self, *args):
        nonlocal done
        end_epoch(self, *args)
        done += 1
        if done == survived:
            raise KeyboardInterrupt

    monkeypatch.setattr(HeadFit, "end_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        run_fit(job, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    assert (tmp_path / "p.partial").is_dir()

    epochs = 0

    def counted(self, *args):
        nonlocal epochs
        epochs += 1
        end_epoch(self, *args)

    monkeypatch.setattr(HeadFit, "end_epoch", counted)
    run_fit(job, tmp_path / "p")
    again, epochs = epochs, 0
    run_fit(job, tmp_path / "q")
    assert again == epochs - survived
    assert files(tmp_path / "p") == files(tmp_path / "whole")
    assert not (tmp_path / "p.partial").exists()


def test_another_request_does_not_take_up_what_is_not_its_own(made, tmp_path, monkeypatch):
    first = FitJob(made.path, "layer_aware", (1,), options=OPTIONS["layer_aware"], device="cpu")
    other = FitJob(made.path, "layer_aware", (1,), options=OPTIONS["layer_aware"], device="cpu", seed=1)
    run_fit(other, tmp_path / "whole")

    end_epoch = HeadFit.end_epoch

    def killed(self, *args):
        end_epoch(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HeadFit, "end_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            run_fit(first, tmp_path / "p")
    assert (tmp_path / "p.partial" / "layer_aware.pt").is_file()
    run_fit(other, tmp_path / "p")
    assert files(tmp_path / "p") == files(tmp_path / "whole")


def test_a_refused_fit_leaves_nothing(made, tmp_path):
    with pytest.raises(UserError):
        run_fit(FitJob(made.path, "layer_aware", (1,), options={"threshold": 2.0}), tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_a_trace_larger_than_memory_is_streamed_and_gives_the_same(made, monkeypatch):
    whole = Rows(made.trace)
    with monkeypatch.context() as patch:
        patch.setattr(trace_rows, "CACHE_BYTES", 1)
        patch.setattr(trace_rows, "STREAM_TOKENS", 100)
        streamed = Rows(made.trace)
        assert isinstance(streamed.topk_TLK, np.memmap)
        assert np.array_equal(streamed.topk_TLK, whole.topk_TLK)
        requests = np.array([0, 3, 4, 17, 39])
        assert np.array_equal(streamed.share_LE(requests), whole.share_LE(requests))
