"""Importer of TensorRT-LLM's expert statistics (``meta_info.json``, ``rank{r}.safetensors``), kind *counts*."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import Phase
from moeless.errors import UserError
from moeless.files import folder_atomic, read_json, reading, sha256
from moeless.spec import MoESpec
from moeless.traces.info import TraceInfo
from moeless.traces.writers import CountsTraceWriter

_KEY = re.compile(r"(\d+)_(\d+)")
#: Types of whole numbers, in safetensors' names.
_COUNTS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
#: A rank's file, and the layers that it has of each iteration.
Rank = tuple[Path, Any, dict[int, set[int]]]


def import_tensorrt_llm(path: Path, out: Path, spec: MoESpec) -> TraceInfo:
    """Write a counts trace from a statistics folder; ranks are summed, iteration by iteration.

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
    with ExitStack() as stack:
        ranks = [_open_rank(file, stack) for file in files]
        iterations = sorted(set().union(*(layers for _, _, layers in ranks)))
        if not iterations:
            raise UserError(f"{path} holds 0 iterations")
        if iterations != list(range(iterations[0], iterations[-1] + 1)):
            raise UserError(f"{path}: iterations are not contiguous")
        layers = _layers(path, ranks, iterations, spec)
        info = TraceInfo(
            "counts",
            spec,
            {"importer": "tensorrt-llm", "files": [f.name for f in files], "sha256": [sha256(f) for f in files]},
            has_weights=False,
        )
        with folder_atomic(out) as folder:
            writer = CountsTraceWriter(folder, info)
            for iteration in iterations:
                load = np.stack([_load(ranks, iteration, layer, spec) for layer in layers])
                writer.append([iteration], int(Phase.MIXED), load[None])
            return writer.close()


def _open_rank(file: Path, stack: ExitStack) -> Rank:
    """The file, mapped, and what its keys name."""
    from safetensors import SafetensorError, safe_open

    try:
        with reading(file):
            opened = stack.enter_context(safe_open(file, framework="numpy"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({error})") from None
    layers: dict[int, set[int]] = {}
    for key in opened.keys():  # noqa: SIM118 (not a mapping)
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(f"{file}: the key {key!r} is not of the form iteration_layer")
        layers.setdefault(int(match.group(1)), set()).add(int(match.group(2)))
    return file, opened, layers


def _layers(path: Path, ranks: Sequence[Rank], iterations: Sequence[int], spec: MoESpec) -> list[int]:
    """The files' layer numbers of our layers; every iteration needs all of them, from one rank or another."""
    seen: set[int] = set()
    of_iteration = [set().union(*(layers.get(i, set()) for _, _, layers in ranks)) for i in iterations]
    seen.update(*of_iteration)
    if sorted(seen) not in (list(spec.moe_layers), list(range(spec.L))):
        raise UserError(f"{path} has statistics of layers {sorted(seen)[:8]}, {spec.name} has {spec.L} MoE layers")
    if any(layers != seen for layers in of_iteration):
        raise UserError(f"{path}: an iteration lacks a layer")
    return sorted(seen)


def _load(ranks: Sequence[Rank], iteration: int, layer: int, spec: MoESpec) -> NDArray[np.int64]:
    load, key = np.zeros(spec.E, np.int64), f"{iteration}_{layer}"
    for file, opened, layers in ranks:
        if layer in layers.get(iteration, ()):
            head = opened.get_slice(key)
            shape, dtype = tuple(head.get_shape()), head.get_dtype()
            if shape != (spec.E,) or dtype not in _COUNTS:
                raise UserError(f"{file}: {key} must be {spec.E} counts, got {dtype} of shape {shape}")
            values = opened.get_tensor(key)
            if (values < 0).any():
                raise UserError(f"{file}: {key} must be {spec.E} counts, got negative ones")
            load += values.astype(np.int64)
    return load
