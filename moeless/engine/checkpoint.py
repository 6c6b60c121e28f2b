"""Reading a Hugging Face checkpoint tensor by tensor, so that no rank holds the whole model."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moeless.errors import UserError
from moeless.files import reading

#: How families name one expert's tensors on disk: folder of experts, then gate, up and down projection.
_SEPARATE = (
    ("block_sparse_moe.experts", "w1.weight", "w3.weight", "w2.weight"),
    ("mlp.experts", "gate_proj.weight", "up_proj.weight", "down_proj.weight"),
)

#: Bits of one number of the types that checkpoints of the supported families use.
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}


class Checkpoint:
    """A folder with ``config.json`` and safetensors files.

    Attributes:
        read_bytes: of all tensors read so far.

    Raises:
        UserError: a file is missing, cut short or not safetensors.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise UserError(f"{folder} is not a model folder: it holds no config.json")
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                self._file_of: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{index} is not a weight index ({error!r})") from None
            for name in sorted(set(self._file_of.values())):
                keys = _check(self.folder / name)
                missing = [key for key, file in self._file_of.items() if file == name and key not in keys]
                if missing:
                    raise UserError(f"{self.folder / name} lacks {missing[0]}, which its index promises")
        else:
            path = self.folder / "model.safetensors"
            self._file_of = dict.fromkeys(_check(path), path.name)
        self._open: dict[str, Any] = {}
        self.read_bytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def _handle(self, key: str) -> Any:
        from safetensors import safe_open

        name = self._file_of[key]
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]

    def read(self, key: str) -> torch.Tensor:
        """One tensor.

        Raises:
            UserError: there is none of that name.
        """
        if key not in self._file_of:
            raise UserError(f"the checkpoint {self.folder} has no tensor {key!r}")
        return self._count(self._handle(key).get_tensor(key))

    def find(self, key: str) -> str | None:
        """The stored name of a model's parameter; some families rename their MoE blocks when they are loaded."""
        names = (
            key,
            key.replace(".mlp.", ".block_sparse_moe."),
            key.replace(".mlp.router.", ".block_sparse_moe.gate."),
        )
        # a text model inside a multimodal checkpoint
        inside = (f"language_model.{name}" for name in names)
        return next((name for name in (*names, *inside) if name in self._file_of), None)

    def read_row(self, key: str, row: int) -> torch.Tensor:
        """``tensor[row]`` without reading the rest; a copy, so that nothing else stays in memory."""
        if key not in self._file_of:
            raise UserError(f"the checkpoint {self.folder} has no tensor {key!r}")
        return self._count(self._handle(key).get_slice(key)[row : row + 1][0].clone())

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        self.read_bytes += tensor.nbytes
        return tensor


def _check(path: Path) -> set[str]:
    """Tensor names of a safetensors file whose header and length agree."""
    try:
        with reading(path), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = path.stat().st_size
            if length > size:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        for name, entry in header.items():
            begin, stop = entry["data_offsets"]
            if entry["dtype"] in _BITS and (stop - begin) * 8 != math.prod(entry["shape"]) * _BITS[entry["dtype"]]:
                raise ValueError(f"tensor {name} has shape {entry['shape']} and {stop - begin:,} bytes")
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end:,} bytes and has {size:,}")
        return set(header)
    except (ValueError, KeyError, TypeError, struct.error, OSError) as error:
        raise UserError(f"{path} is not an intact safetensors file: {error}") from None


def read_expert(checkpoint: Checkpoint, experts_name: str, expert: int) -> dict[str, torch.Tensor]:
    """One expert's ``up`` (gate rows first where gated), ``down`` and biases, as the model's class lays them out.

    Args:
        experts_name: the experts module's name in the model, for example ``model.layers.3.mlp.experts``.

    Raises:
        UserError: the family stores experts in a way that is not known here.
    """
    layer = experts_name.rsplit(".", 2)[0]
    for folder, gate, up, down in _SEPARATE:
        prefix = f"{layer}.{folder}.{expert}"
        if f"{prefix}.{gate}" in checkpoint:
            both = [checkpoint.read(f"{prefix}.{name}") for name in (gate, up)]
            return {"up": torch.cat(both), "down": checkpoint.read(f"{prefix}.{down}")}
    fused = {"up": "gate_up_proj", "down": "down_proj", "up_bias": "gate_up_proj_bias", "down_bias": "down_proj_bias"}
    stored = {name: checkpoint.find(f"{experts_name}.{key}") for name, key in fused.items()}
    found = {name: key for name, key in stored.items() if key is not None}
    if {"up", "down"} <= found.keys():
        return {name: checkpoint.read_row(key, expert) for name, key in found.items()}
    sample = next((key for key in checkpoint if "expert" in key), "no key that names experts")
    raise UserError(
        f"the checkpoint {checkpoint.folder} stores experts in a way that the live engine does not read: it has "
        f"{sample!r}, known are separate gate/up/down tensors per expert and fused gate_up_proj/down_proj"
    )
