"""``auto`` takes a GPU only where it has room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moeless import devices
from moeless.devices import CONTEXT_BYTES, auto_device, gpus_with_room

GB = 10**9


def test_the_first_gpu_with_room_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_gpu_bytes", lambda: [0, 8 * GB, 80 * GB])
    assert auto_device(4 * GB) == ("cuda:1", None)
    assert auto_device(40 * GB) == ("cuda:2", None)
    monkeypatch.setattr(devices, "free_gpu_bytes", lambda: [80 * GB])
    assert auto_device() == ("cuda", None)


def test_full_gpus_leave_the_cpu_and_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_gpu_bytes", lambda: [CONTEXT_BYTES // 2, CONTEXT_BYTES])
    device, remark = auto_device(4 * GB)
    assert device == "cpu"
    assert remark is not None
    assert remark.startswith("GPU 1 has 1.0 GB free of the 5.0 GB that are wanted: the CPU is used")


def test_no_gpu_needs_no_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_gpu_bytes", list)
    assert auto_device() == gpus_with_room(0, 2) == ("cpu", None)


def test_ranks_need_a_gpu_with_room_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_gpu_bytes", lambda: [80 * GB, 2 * GB, 80 * GB])
    assert gpus_with_room(GB, 2) == ("cuda", None)
    assert gpus_with_room(GB, 4)[0] == "cpu"
    device, remark = gpus_with_room(4 * GB, 2)
    assert device == "cpu"
    assert remark is not None
    assert remark.startswith("GPU 1 has 2.0 GB free")


def test_a_full_gpu_stops_neither_recording_nor_fitting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moeless.predictors.gates import checkpoint_folder
    from moeless.predictors.train_evaluate import _device
    from moeless.traces.hf_model import LoadOptions, load_model

    # visible, and full of someone else's work
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "free_gpu_bytes", lambda: [0])
    loaded = load_model(str(checkpoint_folder("bundled")), LoadOptions(device="auto"))
    assert next(loaded.model.parameters()).device.type == "cpu"
    assert _device("auto") == "cpu"
    assert capsys.readouterr().err.count("the CPU is used") == 2


def test_a_live_run_takes_the_cpu_where_gpus_are_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from moeless.engine.bench import LiveBench, LiveConfig

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "free_gpu_bytes", lambda: [80 * GB, 0])
    run = LiveBench(LiveConfig(policies=("static",), max_requests=2))
    assert run.device == "cpu"
    assert "GPU 1 has 0.0 GB free" in run.remarks[0]


def test_free_memory_is_asked_of_the_driver_only_where_there_is_a_gpu() -> None:
    free = devices.free_gpu_bytes()
    assert len(free) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
