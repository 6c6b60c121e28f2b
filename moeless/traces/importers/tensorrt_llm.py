"""Importer of TensorRT-LLM's expert statistics (``meta_info.json``, ``rank{r}.safetensors``), kind *counts*."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from moeless.contracts import Phase
from moeless.errors import UserError
from moeless.files import folder_atomic, read_json, sha256
from moeless.spec import MoESpec
from moeless.traces.info import TraceInfo
from moeless.traces.writers import CountsTraceWriter

_KEY = re.compile(r"(\d+)_(\d+)")


def import_tensorrt_llm(path: Path, out: Path, spec: MoESpec) -> TraceInfo:
    """Write a counts trace from a statistics folder; ranks are summed.

    Raises:
        UserError: the folder breaks the layout or does not fit the model, or ``out`` cannot be written.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; expert statistics are one with meta_info.json and rank*.safetensors")
    meta = read_json(path / "meta_info.json")
    for name, expected in (("num_experts", spec.E), ("num_experts_per_token", spec.K)):
        if not isinstance(meta, dict) or meta.get(name) != expected:
            found = meta.get(name) if isinstance(meta, dict) else None
            raise UserError(f"{path / 'meta_info.json'} says {name} {found}, {spec.name} has {expected}")
    files = sorted(path.glob("rank*.safetensors"))
    if not files:
        raise UserError(f"{path} holds no rank*.safetensors file")
    loads: dict[int, dict[int, np.ndarray]] = {}
    for file in files:
        _add_rank(file, spec, loads)
    if not loads:
        raise UserError(f"{path} holds 0 iterations")
    layers = _layers(path, loads, spec)
    iterations = sorted(loads)
    if iterations != list(range(iterations[0], iterations[-1] + 1)):
        raise UserError(f"{path}: iterations are not contiguous")
    info = TraceInfo(
        "counts",
        spec,
        {"importer": "tensorrt-llm", "files": [f.name for f in files], "sha256": [sha256(f) for f in files]},
        has_weights=False,
    )
    with folder_atomic(out) as folder:
        writer = CountsTraceWriter(folder, info)
        for iteration in iterations:
            load = np.stack([loads[iteration][layer] for layer in layers])
            writer.append([iteration], int(Phase.MIXED), load[None])
        return writer.close()


def _layers(path: Path, loads: dict[int, dict[int, np.ndarray]], spec: MoESpec) -> list[int]:
    seen = {layer for by_layer in loads.values() for layer in by_layer}
    layers = sorted(seen)
    if layers not in (list(spec.moe_layers), list(range(spec.L))):
        raise UserError(f"{path} has statistics of layers {layers[:8]}, {spec.name} has {spec.L} MoE layers")
    if any(set(by_layer) != seen for by_layer in loads.values()):
        raise UserError(f"{path}: an iteration lacks a layer")
    return layers


def _add_rank(file: Path, spec: MoESpec, loads: dict[int, dict[int, np.ndarray]]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({error})") from None
    for key, values in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(f"{file}: the key {key!r} is not of the form iteration_layer")
        if values.shape != (spec.E,) or values.dtype.kind not in "iu" or (values < 0).any():
            raise UserError(f"{file}: {key} must be {spec.E} counts, got {values.dtype} of shape {values.shape}")
        by_layer = loads.setdefault(int(match.group(1)), {})
        layer = int(match.group(2))
        by_layer[layer] = by_layer.get(layer, np.zeros(spec.E, np.int64)) + values.astype(np.int64)
