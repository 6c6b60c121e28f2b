import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from moeless.cluster import cluster
from moeless.contracts import LayerPlan
from moeless.costs.measured import MeasuredCosts
from moeless.costs.profile_reader import load_profile, parse_profile, shipped_profiles
from moeless.errors import RunFailed, UserError
from moeless.files import write_json
from moeless.profiling import busy, copies, run
from moeless.profiling.layers import layer_fits
from moeless.profiling.run import ProfileOptions, make_plan
from moeless.profiling.summary import summarise
from moeless.profiling.timing import Effort
from moeless.spec import PRESETS, preset


def test_a_profile_measured_here_is_one_that_the_cost_model_takes(quick_profile, tmp_path):
    path = tmp_path / "cpu.json"
    write_json(path, quick_profile)
    costs = MeasuredCosts(preset("bundled"), cluster("cpu2"), profile=str(path))
    plan = LayerPlan.build(0, np.arange(16), np.arange(16) // 8, np.ones(16, bool), num_experts=16, num_gpus=2)
    even = np.full((2, 16), 8)
    hot = even.copy()
    hot[:, 0] += 120
    # the exchange is wall time of ranks that share cores with other work: only compute is sure to rise
    assert 0 < costs.layer_seconds(even, plan).expert < costs.layer_seconds(hot, plan).expert
    assert costs.layer_seconds(even, plan).all_to_all > 0
    assert all(seconds > 0 for seconds in (costs.terms().token_seconds, costs.terms().link_seconds))
    assert not any("exchange" in warning for warning in costs.warnings)


def test_a_profile_holds_the_engines_layer_among_ranks(quick_profile):
    entry = quick_profile["exchange"][0]["engine"]
    assert entry["tokens"][0] == 1
    assert entry["layers"] >= preset("bundled").L * len(entry["tokens"])
    # a layer is no less than its experts, and more than its parts say
    assert (np.array(entry["layer"]) > np.array(entry["layer_expert"])).all()
    assert min(entry["rest_seconds"] + entry["expert_seconds"]) > 0
    mixtral = preset("mixtral-8x7b")
    assert not layer_fits(mixtral)


def test_a_profile_says_where_and_how_it_was_made(quick_profile):
    assert quick_profile["machine"]["device"] == "cpu"
    assert quick_profile["machine"]["threads"] == 1
    assert quick_profile["program"]["torch"] == torch.__version__
    assert quick_profile["program"]["quick"] is True
    grid = quick_profile["experts"][0]
    low, middle, high = (np.array(grid[name]) for name in ("low", "measured", "high"))
    assert (low <= middle).all()
    assert (middle <= high).all()
    assert {"tokens_median", "active_max"} <= set(grid["leave_one_out"])
    # no kernel beats twice what the same library reaches on a large matrix product
    assert grid["best_flops"] < 2 * quick_profile["ceilings"]["flops"]["float32"]


def test_shipped_profiles_are_valid_and_fit_their_presets():
    for name in shipped_profiles():
        profile = load_profile(name)
        profile.check_model(PRESETS[profile.document["model"]["name"]])


def test_the_bundled_model_has_a_shipped_cpu_profile():
    costs = MeasuredCosts(preset("bundled"), cluster("cpu2"))
    assert costs.profile.document["machine"]["device"] == "cpu"
    assert costs.profile.document["program"]["quick"] is False


def test_the_load_of_a_shared_node_does_not_count_where_cores_are_restricted(monkeypatch):
    monkeypatch.setattr(busy.os, "getloadavg", lambda: (300.0, 300.0, 300.0))
    monkeypatch.setattr(busy.os, "cpu_count", lambda: 128)
    monkeypatch.setattr(busy, "cores", lambda: 4)
    tried = []
    monkeypatch.setattr(busy, "core_share", lambda threads: tried.append(threads) or 0.99)
    assert busy.check_idle(torch.device("cpu"), force=False, ranks=8) == []
    # its own cores are tried all at once
    assert tried == [4]
    monkeypatch.setattr(busy, "core_share", lambda _: 0.5)
    with pytest.raises(RunFailed, match=r"busy \(4 spinning threads get 50% of a core\)"):
        busy.check_idle(torch.device("cpu"), force=False, ranks=8)


def test_spinning_threads_report_a_share_of_a_core():
    assert 0.0 < busy.core_share(2, 0.02) <= 1.1


def test_storage_that_lies_in_memory_is_not_timed(monkeypatch, tmp_path, quick_profile):
    monkeypatch.setattr(copies, "file_system", lambda _: "tmpfs")
    effort = Effort(0.0, 3, 3)
    assert set(copies.measure_copies(torch.device("cpu"), [1 << 10], tmp_path, effort)) == {"host_to_device_pageable"}
    remark = copies.describe_storage(tmp_path)
    assert remark == f"{tmp_path} lies in memory (tmpfs), which tells nothing about storage"
    left = {name: curve for name, curve in quick_profile["copies"].items() if name != "disk_to_host"}
    document = quick_profile | {"copies": left, "machine": quick_profile["machine"] | {"storage": remark}}
    assert summarise(document)["storage"] == f"not measured: {remark}"
    # the cost model takes the cluster's bandwidth, and says so
    costs = MeasuredCosts(preset("bundled"), cluster("cpu2"), profile=parse_profile(document, "here"))
    assert costs.load_seconds(1e6, "storage", 0) > 0
    assert any("copies from storage were not measured" in warning for warning in costs.warnings)


def test_storage_with_a_disk_is_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(copies, "file_system", lambda _: "ext4")
    found = copies.measure_copies(torch.device("cpu"), [1 << 10], tmp_path, Effort(0.0, 3, 3))
    assert found["disk_to_host"]["seconds"][0] > 0
    assert copies.describe_storage(tmp_path) == "ext4"


def test_a_busy_processor_is_refused_unless_forced(monkeypatch):
    monkeypatch.setattr(busy, "cores", lambda: os.cpu_count())
    monkeypatch.setattr(busy.os, "getloadavg", lambda: (9.0, 9.0, 9.0))
    with pytest.raises(RunFailed, match=r"busy \(the load average is 9\.00"):
        busy.check_idle(torch.device("cpu"), force=False)
    assert busy.check_idle(torch.device("cpu"), force=True)[0].startswith("the load average is 9.00")


def test_an_idle_processor_is_accepted(monkeypatch):
    monkeypatch.setattr(busy, "cores", lambda: os.cpu_count())
    monkeypatch.setattr(busy.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(busy, "core_share", lambda _: 1.0)
    assert busy.check_idle(torch.device("cpu"), force=False) == []
    monkeypatch.setattr(busy, "core_share", lambda _: 0.5)
    with pytest.raises(RunFailed, match="a spinning thread gets 50%"):
        busy.check_idle(torch.device("cpu"), force=False)


def test_requests_that_cannot_be_measured_are_refused():
    spec = preset("bundled")
    with pytest.raises(UserError, match="--dtype int4"):
        make_plan(spec, "cpu", ProfileOptions(dtypes=("int4",)))
    with pytest.raises(UserError, match="--device must be cpu, cuda"):
        make_plan(spec, "tpu", ProfileOptions())
    with pytest.raises(UserError, match="--ranks and --threads"):
        make_plan(spec, "cpu", ProfileOptions(ranks=0))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            make_plan(spec, "cuda", ProfileOptions())


@pytest.mark.parametrize("model", sorted(PRESETS))
def test_every_preset_has_a_plan_within_memory(model):
    plan = make_plan(preset(model), "cpu", ProfileOptions(quick=True))
    assert plan.active[0] == plan.tokens[0] == 1
    assert plan.active[-1] <= preset(model).num_experts


def test_command_writes_a_profile_and_leaves_nothing_of_a_failed_one(cli, tmp_path, monkeypatch, quick_profile):
    out = tmp_path / "made" / "cpu.json"
    monkeypatch.setattr(run, "profile_model", lambda *_: quick_profile)
    status, printed, _ = cli("profile", "--model", "bundled", "--quick", "--force", "--out", out, "--json")
    assert status == 0
    assert json.loads(printed)["out"] == str(out)
    assert parse_profile(json.loads(out.read_text()), str(out)).name == "cpu-bundled"

    def fails(*_):
        raise RunFailed("the device is busy")

    monkeypatch.setattr(run, "profile_model", fails)
    status, _, error = cli("profile", "--model", "bundled", "--out", tmp_path / "no.json")
    assert (status, error.strip()) == (1, "moeless: the device is busy")
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "gpt-5"], "no model preset is called 'gpt-5'"),
        (["--model", "bundled", "--links", "pigeon"], "no link model is called 'pigeon'"),
        (["--model", "bundled", "--device", "abacus"], "--device must be cpu"),
        (["--model", "bundled", "--out", "."], "is a folder"),
    ],
)
def test_command_refuses_with_one_sentence(cli, arguments, says):
    status, _, error = cli("profile", *arguments)
    assert status == 2
    assert says in error
    assert len(error.strip().splitlines()) == 1


def test_dry_run_measures_nothing(cli, tmp_path):
    status, printed, _ = cli("profile", "--model", "deepseek-v3", "--dry-run", "--out", tmp_path / "p.json")
    assert status == 0
    plan = json.loads(printed)["plan"]
    assert plan["estimated_seconds"] > 0
    assert plan["peak_device_bytes"] > 0
    assert not list(tmp_path.iterdir())


def test_profiling_needs_torch_numpy_and_safetensors_only():
    blocked = (
        "numba scipy pydantic typer rich pyarrow transformers megatron datasets wandb optuna yaml matplotlib jinja2"
    )
    program = (
        f"import sys\nfor name in {blocked.split()!r}: sys.modules[name] = None\n"
        "import moeless.profiling.run, moeless.profiling.hotpath, moeless.profiling.collectives\n"
        "import moeless.profiling.links, moeless.profiling.summary, moeless.profiling.emulate\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
