"""Reading a model's gates from a checkpoint, without loading the model.

Axes: L MoE layers, E experts, H hidden size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.errors import UserError
from moeless.files import read_json, reading
from moeless.predictors.router import RouterRule, rule_of
from moeless.spec import MoESpec

FloatMatrix = NDArray[np.float32]

#: The names under which families store a gate: ``mlp.gate.weight`` (Qwen, OLMoE, DeepSeek), ``block_sparse_moe.gate``
#: (Mixtral, Phi), ``mlp.router`` (gpt-oss), ``feed_forward.router`` (Llama 4, Jamba), ``router.layer`` (Granite, DBRX).
_GATE = re.compile(
    r"(?:^|\.)(?:layers|blocks)\.(\d+)\."
    r"(?:mlp|block_sparse_moe|feed_forward|ffn|mixer|moe)\.(?:gate|router)(?:\.layer|\.wg)?"
    r"\.(weight|bias|e_score_correction_bias)$"
)
#: Corrections stored beside the gate instead of inside it (MiniMax-M2, Ernie 4.5).
_CORRECTION = re.compile(
    r"(?:^|\.)layers\.(\d+)\.(?:mlp|block_sparse_moe)\.(?:moe_statics\.)?(e_score_correction_bias)$"
)


@dataclass(frozen=True)
class Gates:
    """All gates of a model, in order of its MoE layers.

    Attributes:
        weight_LEH: the gates, float32.
        bias_LE: added to the logits; None if the family has none.
        correction_LE: added to the scores when experts are chosen; None if the family has none.
        rule: how the router chooses experts from logits.
        source: the model or folder that they were read from.
    """

    weight_LEH: FloatMatrix
    bias_LE: FloatMatrix | None
    correction_LE: FloatMatrix | None
    rule: RouterRule
    source: str

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays as predictors keep them, with weights in 16 bits."""
        kept = {"gate": self.weight_LEH.astype(np.float16), "bias": self.bias_LE, "correction": self.correction_LE}
        return {name: array for name, array in kept.items() if array is not None}

    def check(self, spec: MoESpec) -> None:
        """Check that the gates have the model's shape.

        Raises:
            UserError: they have not.
        """
        wanted = (spec.L, spec.E, spec.hidden_size)
        if self.weight_LEH.shape != wanted:
            raise UserError(f"{self.source} has gates of shape {self.weight_LEH.shape}, {spec.name} has {wanted}")


def read_gates(model: str | Path, spec: MoESpec) -> Gates:
    """Read the gates of a Transformers checkpoint: a folder, or a hub id that is in the local cache.

    Raises:
        UserError: there is no such checkpoint, its family's router is not supported, or a layer's gate is missing.
    """
    folder = checkpoint_folder(model)
    config = read_json(folder / "config.json")
    rule = rule_of(config)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no safetensors weights; gates are read from safetensors only")
    found = _read_keys(files)
    weight_LEH = np.zeros((spec.L, spec.E, spec.hidden_size), np.float32)
    added: dict[str, FloatMatrix] = {}
    for layer, absolute in enumerate(spec.moe_layers):
        gate_EH = found.get((absolute, "weight"))
        if gate_EH is None:
            raise UserError(
                f"{folder} holds no gate for layer {absolute}; name the model that the trace was recorded from"
            )
        if gate_EH.shape != weight_LEH.shape[1:]:
            raise UserError(
                f"{folder}: the gate of layer {absolute} has shape {gate_EH.shape}, "
                f"{spec.name} needs {weight_LEH.shape[1:]}; name the model that the trace was recorded from"
            )
        weight_LEH[layer] = gate_EH
        for part in ("bias", "e_score_correction_bias"):
            if (absolute, part) in found:
                added_LE = added.setdefault(part, np.zeros((spec.L, spec.E), np.float32))
                added_LE[layer] = found[absolute, part].reshape(-1)
    return Gates(weight_LEH, added.get("bias"), added.get("e_score_correction_bias"), rule, str(model))


def checkpoint_folder(model: str | Path) -> Path:
    """The folder of a checkpoint: ``bundled``, a path, or a hub id that is in the local cache.

    Raises:
        UserError: there is none on this machine.
    """
    if str(model) == "bundled":
        import moeless

        return Path(moeless.__file__).parent / "assets" / "model"
    folder = Path(model)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise UserError(f"{folder} is not a model: it holds no config.json")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(model), local_files_only=True))
    except Exception:
        # every way in which an id can be wrong or absent ends in the same advice
        raise UserError(
            f"there is no model {str(model)!r} on this machine; give a folder with config.json and safetensors, "
            "or the id of a model in the Hugging Face cache"
        ) from None


def _read_keys(files: list[Path]) -> dict[tuple[int, str], Any]:
    import torch
    from safetensors import SafetensorError, safe_open

    found: dict[tuple[int, str], Any] = {}
    for path in files:
        try:
            with reading(path), safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    match = _GATE.search(key) or _CORRECTION.search(key)
                    if match:
                        found[int(match[1]), match[2]] = file.get_tensor(key).to(torch.float32).numpy()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error})") from None
    return found
