"""Specs derive bytes, FLOPs and parameter counts that agree with what the models' authors publish."""

from __future__ import annotations

import json

import pytest

from moeless.errors import UserError
from moeless.spec import PRESETS, MoESpec, preset

PUBLISHED = sorted(name for name, spec in PRESETS.items() if spec.published_params)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_totals_agree_with_the_published_ones(name: str) -> None:
    spec = preset(name)
    # authors round to three digits; Llama-4's figure includes a vision tower of about 1 %
    tolerance = 0.015 if name == "llama-4-scout" else 0.003
    assert spec.total_params == pytest.approx(spec.published_params, rel=tolerance)
    assert spec.active_params == pytest.approx(spec.published_active_params, rel=0.02)


def test_mixtral_expert_is_a_third_of_a_gibibyte_and_351_megaflop_a_token() -> None:
    spec = preset("mixtral-8x7b")
    assert spec.expert_bytes == 3 * 4096 * 14336 * 2
    assert spec.expert_flops == 2 * 3 * 4096 * 14336


def test_deepseek_counts_moe_layers_without_the_dense_ones() -> None:
    spec = preset("deepseek-v3")
    assert (spec.L, spec.num_layers, spec.moe_layers[0]) == (58, 61, 3)
    assert spec.kv_bytes_per_token == 61 * (512 + 64) * 2


def test_quantisation_changes_bytes_and_not_flops() -> None:
    native = preset("gpt-oss-20b")
    wide = native.with_expert_dtype("bfloat16")
    assert wide.expert_flops == native.expert_flops
    assert wide.expert_bytes / native.expert_bytes == pytest.approx(2 / (0.5 + 1 / 32), rel=1e-6)


def test_shared_experts_count_as_active_and_not_as_routed() -> None:
    spec = preset("llama-4-scout")
    assert spec.shared_params == 3 * 5120 * 8192
    assert spec.active_params > spec.L * (spec.shared_params + spec.expert_params)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_spec_survives_json(name: str) -> None:
    assert MoESpec.from_json(json.loads(json.dumps(preset(name).to_json()))) == preset(name)


@pytest.mark.parametrize(
    "change",
    [{"top_k": 99}, {"hidden_size": 0}, {"moe_layers": []}, {"moe_layers": [1, 0]}, {"expert_dtype": "int3"}, {"x": 1}],
)
def test_a_wrong_spec_is_refused_with_one_sentence(change: dict[str, object]) -> None:
    with pytest.raises(UserError) as refused:
        MoESpec.from_json(preset("bundled").to_json() | change)
    assert "\n" not in str(refused.value)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"mixtral-8x7b"):
        preset("mixtral")
