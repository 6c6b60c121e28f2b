"""Exported plans obey each engine's rules, and say so where a plan cannot be expressed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from moeless.contracts import ModelPlan
from moeless.errors import UserError
from moeless.placement.export import check_sglang, check_tensorrt_llm, slot_table, to_arrays, write_export
from moeless.placement.moe_layers import layers_of
from moeless.spec import preset


@pytest.fixture(scope="module")
def plans(plan_with):
    """Three MoE layers of a five-layer model, 12 experts, 4 GPUs, by planner."""

    def make(planner: str, extra: int = 1, **params) -> ModelPlan:
        layers = []
        for index in range(3):
            load = np.random.default_rng(index).integers(1, 20_000, 12)
            made = plan_with(planner, load, 4, extra, **params)
            layers.append(type(made)(index, made.expert_R, made.gpu_R, made.primary_R))
        return ModelPlan("small", 12, 4, planner, tuple(layers), {"moe_layers": [1, 2, 4], "num_layers": 5})

    return make


def test_sglang_rows_cover_dense_layers_and_keep_the_placement(plans, tmp_path):
    plan, out = plans("eplb"), tmp_path / "location.json"
    write_export(plan, "sglang", out, moe_layers=(1, 2, 4), num_layers=5)
    data = json.loads(out.read_text())
    check_sglang(data, 12, 5, 4)
    row = data["physical_to_logical_map"][4]
    for gpu in range(4):
        held = plan.layers[2].expert_R[plan.layers[2].gpu_R == gpu]
        assert sorted(row[gpu * 4 : gpu * 4 + 4]) == sorted(held.tolist())
    for broken in (
        {"physical_to_logical_map": data["physical_to_logical_map"][:4]},
        data | {"logical_count": []},
        {"physical_to_logical_map": [[0] * 16] * 5},
        {"physical_to_logical_map": [row[:15]] * 5},
    ):
        with pytest.raises(UserError):
            check_sglang(broken, 12, 5, 4)


def test_tensorrt_llm_uses_absolute_layers_and_divisible_slots(plans, tmp_path):
    out = tmp_path / "eplb.yaml"
    write_export(plans("eplb"), "tensorrt-llm", out, moe_layers=(1, 2, 4), num_layers=5)
    data = yaml.safe_load(out.read_text())
    assert (data["num_slots"], data["layer_updates_per_iter"]) == (16, 0)
    assert list(data["initial_global_assignments"]) == [1, 2, 4]
    check_tensorrt_llm(data, 12, (1, 2, 4), 4)
    with pytest.raises(UserError, match="exactly"):
        check_tensorrt_llm(data | {"window": 1}, 12, (1, 2, 4), 4)
    with pytest.raises(UserError, match="every MoE layer"):
        check_tensorrt_llm(data, 12, (1, 2, 3), 4)


@pytest.mark.parametrize("name", ["arrays.npz", "arrays.json"])
def test_arrays_agree_with_each_other(plans, tmp_path, name):
    plan, out = plans("eplb"), tmp_path / name
    write_export(plan, "vllm", out, moe_layers=(1, 2, 4), num_layers=5)
    read = np.load(out) if name.endswith("npz") else {k: np.array(v) for k, v in json.loads(out.read_text()).items()}
    assert (read["logcnt"].sum(1) == 16).all()
    for layer in range(3):
        for expert in range(12):
            slots = read["log2phy"][layer, expert]
            assert (slots >= 0).sum() == read["logcnt"][layer, expert]
            assert (read["phy2log"][layer, slots[slots >= 0]] == expert).all()


def test_uneven_plans_need_filling(plans):
    plan = plans("moeless", cv_threshold=0.9)
    with pytest.raises(UserError, match="as many slots on every GPU"):
        slot_table(plan)
    table = slot_table(plan, fill=True)
    assert table.filled > 0
    arrays = to_arrays(plan, table)
    assert (arrays["logcnt"] >= 1).all()
    for layer, row in zip(plan.layers, table.expert_LP, strict=True):
        for gpu, slots in enumerate(row.reshape(4, -1)):
            assert set(slots.tolist()) == set(layer.expert_R[layer.gpu_R == gpu].tolist())


def test_unequal_shares_are_refused_unless_the_placement_alone_is_wanted(plans, tmp_path):
    plan, out = plans("eplb"), tmp_path / "location.json"
    where = {"moe_layers": (1, 2, 4), "num_layers": 5}

    def with_shares(last):
        layer = plan.layers[1]
        even = 1.0 / layer.replicas_E(12)[layer.expert_R]
        copies = np.flatnonzero(layer.expert_R == layer.expert_R[np.flatnonzero(even < 1)[0]])
        even[copies[0]], even[copies[1]] = even[copies[0]] + last, even[copies[1]] - last
        return replace(plan, layers=(plan.layers[0], replace(layer, share_R=even), plan.layers[2]))

    write_export(with_shares(0.0), "sglang", out, **where)
    placed = out.read_text()
    out.unlink()
    with pytest.raises(UserError, match=r"unequal shares .* in 1 of 3 layers .*--equal-shares"):
        write_export(with_shares(0.25), "sglang", out, **where)
    assert not out.exists()
    write_export(with_shares(0.25), "sglang", out, **where, equal_shares=True)
    assert out.read_text() == placed


def test_what_cannot_be_written_is_one_sentence(plans, tmp_path):
    plan = plans("eplb")
    with pytest.raises(UserError, match="there are: sglang"):
        write_export(plan, "ollama", tmp_path / "x.json", moe_layers=(1, 2, 4), num_layers=5)
    with pytest.raises(UserError, match="yaml"):
        write_export(plan, "tensorrt-llm", tmp_path / "x.json", moe_layers=(1, 2, 4), num_layers=5)
    with pytest.raises(UserError, match="MoE layers"):
        write_export(plan, "sglang", tmp_path / "x.json", moe_layers=(1, 2), num_layers=5)
    assert list(tmp_path.iterdir()) == []


def test_layer_indices_come_from_the_notes_or_a_preset(plans):
    plan = plans("eplb")
    assert layers_of(plan) == ((1, 2, 4), 5)
    with pytest.raises(UserError, match="experts"):
        layers_of(plan, "deepseek-v3")
    bare = ModelPlan("unheard-of", 12, 4, "eplb", plan.layers)
    with pytest.raises(UserError, match="--model"):
        layers_of(bare)
    assert preset("deepseek-v3").moe_layers[0] == 3


def test_command_writes_what_the_engine_reads(plans, tmp_path, cli):
    path, out = tmp_path / "plan.json", tmp_path / "location.json"
    path.write_text(json.dumps(plans("eplb").to_json()))
    status, stdout, _ = cli("export-plan", path, "--engine", "sglang", "--out", out, "--json")
    assert status == 0
    assert json.loads(stdout)["slots_per_layer"] == 16
    check_sglang(json.loads(out.read_text()), 12, 5, 4)
    status, _, stderr = cli("export-plan", tmp_path / "none.json", "--engine", "sglang", "--out", out)
    assert (status, stderr.count("\n")) == (2, 1)
    path.write_text("{}")
    status, _, stderr = cli("export-plan", path, "--engine", "sglang", "--out", out)
    assert status == 2
    assert "not a plan file" in stderr
