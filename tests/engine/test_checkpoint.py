"""Checkpoints are checked before anything runs, and experts are read one by one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeless.engine.checkpoint import Checkpoint, read_expert
from moeless.errors import UserError


def test_a_checkpoint_cut_short_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("mixtral"), folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not an intact safetensors file: it should have"):
        Checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"garbage that is no header at all"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not an intact safetensors file"):
        Checkpoint(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_read_one_by_one_are_the_loaded_model_s(tiny: Callable[[str], Path], kind: str) -> None:
    import transformers

    folder = tiny(kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    checkpoint = Checkpoint(folder)
    for layer in (0, 2):
        name = f"model.layers.{layer}.mlp.experts"
        module = model.get_submodule(name)
        for expert in (0, 5):
            found = read_expert(checkpoint, name, expert)
            torch.testing.assert_close(found["up"].float(), module.gate_up_proj[expert])
            torch.testing.assert_close(found["down"].float(), module.down_proj[expert])
            assert found["up"].untyped_storage().nbytes() <= 4 * found["up"].numel()
            if kind == "gpt_oss":
                torch.testing.assert_close(found["up_bias"].float(), module.gate_up_proj_bias[expert])


def test_an_unknown_layout_is_refused_with_what_was_found(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text("{}")
    save_file({"layers.0.experts.strange": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"it has 'layers\.0\.experts\.strange'"):
        read_expert(Checkpoint(tmp_path), "model.layers.0.mlp.experts", 0)
