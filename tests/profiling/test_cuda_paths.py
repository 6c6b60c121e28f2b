"""The CUDA paths of the profiler and of the GPU benchmark, run on a GPU that is the CPU (``fake_cuda.py``)."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moeless.cluster import cluster
from moeless.costs.measured import MeasuredCosts
from moeless.costs.profile_reader import load_profile
from moeless.engine.controller import Decision
from moeless.engine.device import upload
from moeless.engine.elastic import PARTS, ElasticExperts
from moeless.engine.exchange import Exchange
from moeless.engine.ffn import GatedFFN, silu_gate
from moeless.engine.forecasting import Forecasting
from moeless.engine.groups import Ranks
from moeless.errors import RunFailed, UserError
from moeless.placement.static import static_plan
from moeless.profiling import busy, ceilings, copies, run
from moeless.profiling.run import ProfileOptions, make_plan
from moeless.profiling.timing import Effort, measure_in_turn
from moeless.spec import preset

GPU = torch.device("cuda", 0)


def fake_cuda():
    path = Path(__file__).with_name("fake_cuda.py")
    made = importlib.util.spec_from_file_location("fake_cuda", path)
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(monkeypatch):
    """The GPU, with small ceilings and grids; the list of what was asked of it."""
    calls = []
    threads = torch.get_num_threads()
    for module, name, value in (
        (ceilings, "SIDE", {"cuda": 64, "cpu": 64}),
        (ceilings, "COPY_BYTES", {"cuda": 2**16, "cpu": 2**16}),
        (copies, "OVERLAP_SIDE", {"cuda": 64, "cpu": 64}),
        (run, "COPY_SIZES", {"cuda": [1 << 10, 1 << 14], "cpu": [1 << 10]}),
        (run, "TOKENS_CUDA", (1, 4, 16)),
        (run, "ACTIVE_CUDA", (1, 2, 5)),
    ):
        monkeypatch.setattr(module, name, value)
    with fake_cuda().install(monkeypatch, calls):
        yield calls
    torch.set_num_threads(threads)


@pytest.fixture
def bench(monkeypatch, shared_data):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    for name in ("bench_gpu", "gpu_layers", "gpu_gap", "gap_protocol"):
        sys.modules.pop(name, None)
    module = importlib.import_module("bench_gpu")
    monkeypatch.setattr(module, "KERNEL_TOKENS", {"cuda": (8, 100)})
    small = [module.gpu_layers.REGIMES[5], module.gpu_layers.REGIMES[3]]
    monkeypatch.setattr(module.gpu_layers, "REGIMES", tuple(small))
    monkeypatch.setattr(module, "Effort", lambda *_: Effort(0.0, 3, 3))
    monkeypatch.setattr(run, "Effort", lambda *_: Effort(0.0, 3, 3))
    return module


def test_times_come_from_events_behind_a_filled_queue(gpu):
    first, second = measure_in_turn([[lambda: None], [lambda: None, lambda: None]], GPU, Effort(0.0, 4, 4))
    assert (first.kept, second.kept) == (4, 4)
    assert gpu.index("_sleep") > gpu.index("synchronize")
    assert gpu[-1] == "synchronize"


def test_a_gpu_in_use_is_refused_unless_forced(gpu, monkeypatch):
    assert busy.check_idle(busy.resolve_device("cuda"), force=False) == []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**32, 2**33))
    with pytest.raises(RunFailed, match=r"busy \(4\.0 GiB of its memory are taken"):
        busy.check_idle(GPU, force=False)
    assert len(busy.check_idle(GPU, force=True)) == 1
    with pytest.raises(UserError, match="there are 1 CUDA devices, counted from 0"):
        busy.resolve_device("cuda:3")
    with pytest.raises(UserError, match="needs as many GPUs, there are 1"):
        make_plan(preset("bundled"), "cuda", ProfileOptions(ranks=2))


def test_the_gpus_from_the_chosen_one_on_are_checked_and_timed(gpu, monkeypatch, tmp_path):
    free = {0: 2**30, 3: 2**33, 4: 2**33}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 2**33))
    options = ProfileOptions(ranks=2, quick=True)
    plan = make_plan(preset("bundled"), "cuda:3", options)
    # events and streams are made on the current device
    assert "set_device 3" in gpu

    def measured(ranks, device, quick):
        raise Timed(ranks, device)

    monkeypatch.setattr(run, "measure_exchange", measured)
    with pytest.raises(Timed) as timed:
        run.profile_model(preset("bundled"), plan, options, tmp_path)
    assert timed.value.args == (2, "cuda:3")
    assert [str(device) for device in busy.devices_of(plan.device, 2)] == ["cuda:3", "cuda:4"]
    free[4] = 2**30
    with pytest.raises(RunFailed, match=r"GPU 4: 7\.0 GiB of its memory are taken"):
        run.profile_model(preset("bundled"), plan, options, tmp_path)
    with pytest.raises(UserError, match="--device cuda:4 with --ranks 2 means GPUs 4 to 5; there are 5"):
        make_plan(preset("bundled"), "cuda:4", options)


class Timed(Exception):
    """What was asked to be timed."""


def test_copies_come_from_another_gpu_only_where_it_was_chosen(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    effort = Effort(0.0, 3, 3)
    assert "peer_to_device" not in copies.measure_copies(GPU, [1 << 10], tmp_path, effort)
    assert "peer_to_device" in copies.measure_copies(GPU, [1 << 10], tmp_path, effort, torch.device("cuda", 1))


def test_everything_is_measured_in_one_command_that_goes_on_where_it_stopped(gpu, bench, tmp_path, capsys):
    asked = ["--device", "cuda", "--models", "bundled", "--out", str(tmp_path), "--pairs", "1", "--gap-pairs", "1"]
    # no time is left: every stage waits
    assert bench.main([*asked, "--seconds", "0"]) == 0
    assert "run the same command again for cuda-bundled, kernels" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.json"))

    assert bench.main(asked) == 0
    assert {"pin_memory", "_sleep", "stream", "current_stream", "get_device_capability"} <= set(gpu)
    profile = load_profile(tmp_path / "cuda-bundled.json")
    machine = profile.document["machine"]
    assert (machine["device"], machine["name"], machine["compute_capability"]) == ("cuda", "Made GPU", "9.0")
    assert {"host_to_device_pinned", "host_to_device_pageable", "device_to_device"} <= set(profile.copies)
    assert [(grid.kernel, grid.dtype) for grid in profile.experts] == [
        ("grouped_mm", "bfloat16"),
        ("loop", "bfloat16"),
    ]
    costs = MeasuredCosts(preset("bundled"), cluster("h100x8"), profile=profile)
    assert "the exchange is computed from the link model h100-dgx, not measured among ranks" in costs.warnings
    emulated = json.loads((tmp_path / "emulated.json").read_text())["cells"]
    assert len(emulated) == 8
    assert all(np.isfinite(cell["model_error_mean"]) for cell in emulated)
    gap = {(c["regime"], c["planner"]): c for c in json.loads((tmp_path / "gap.json").read_text())["cells"]}
    assert len(gap) == 2 * len(bench.gpu_gap.PLANNERS_SHOWN)
    assert gap["decode 2048", "static"]["saved_percent"] == 0.0
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert all(row["correct"] for row in rows)
    assert {row["tokens"] for row in rows} == {8, 100}

    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert bench.main(asked) == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == written
    assert "profile bundled" in (tmp_path / "bench.txt").read_text()


def test_engine_layers_wait_for_the_device_once_an_iteration(gpu):
    shapes = {"up": (8, 4), "down": (4, 4)}
    load_SE = np.array([[3, 1]])
    store = SimpleNamespace(
        slots_L=[{name: torch.randn(2, *shape) for name, shape in shapes.items()}] * 2,
        slot_of_expert=lambda _: {0: 0, 1: 1},
        resident=lambda _: 2,
    )
    controller = SimpleNamespace(
        policy=SimpleNamespace(lossy=False),
        store=store,
        rank=0,
        exchange=Exchange(Ranks(0, 1, GPU, None, None, 0, 1)),
        decide=lambda layer, *_: Decision(static_plan(layer, 2, 1), load_SE, load_SE, 2),
    )
    experts = ElasticExperts(controller, GatedFFN(shapes, torch.float32, silu_gate))
    layers = torch.randn(2, 4, 4), torch.tensor([[0], [0], [1], [0]]), torch.ones(4, 1)
    for layer in range(2):
        experts(layer, layers[0][layer], layers[1], layers[2])
    at = {name: PARTS.index(name) for name in ("compute", "exchange", "total")}
    assert [row[at["compute"]] for row in experts.rows] == [0.0, 0.0]
    assert "synchronize" not in gpu
    experts.settle()
    for row in experts.rows:
        assert 0 < row[at["compute"]] < row[at["compute"]] + row[at["exchange"]] < row[at["total"]]
    assert len(upload(np.arange(3), GPU)) == 3
    assert gpu.count("pin_memory") == 1


def test_a_forecast_beside_the_experts_has_a_stream_of_its_own(gpu, monkeypatch):
    kept = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: kept.append(stream))
    forecasting, times = (
        Forecasting(GPU),
        SimpleNamespace(forecast_beside=0.0, forecast_beside_wait=0.0, forecast_beside_exposed=0.0),
    )
    forecasting.ask(lambda: np.arange(4), torch.zeros(2, 2))
    assert forecasting.collect(times).tolist() == [0, 1, 2, 3]
    assert forecasting.collect(times) is None
    forecasting.close()
    assert len(kept) == 1
    assert times.forecast_beside > 0
    assert gpu.count("stream") == 1
