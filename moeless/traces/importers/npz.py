"""Importer of the documented NPZ layout: ``experts [T,L,K]``, ``offsets [N+1]``, optional ``probs``, ``category``."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moeless.errors import UserError
from moeless.spec import MoESpec
from moeless.traces.importers.npz_stream import ArrayStream, open_npz
from moeless.traces.importers.request_rows import ImportedRequest, write_requests
from moeless.traces.info import TraceInfo

LAYOUT = "experts [tokens, layers, top-k], offsets [requests + 1] and optionally probs, category, prompt_tokens, tokens"
_NAMES = ("experts", "offsets")
_OPTIONAL = ("probs", "category", "prompt_tokens", "tokens")
#: Requests whose offsets, categories and prompt lengths are read at once.
_BLOCK = 4096


def import_npz(path: Path, out: Path, spec: MoESpec) -> TraceInfo:
    """Write a token trace from an NPZ file of that model, request by request.

    Without ``prompt_tokens`` all rows count as generated tokens (phase 1), as in recordings of answers only.

    Raises:
        UserError: the file breaks the layout or does not fit the model, or ``out`` cannot be written.
    """
    with open_npz(path, LAYOUT) as archive:
        arrays = _open(path, archive)
        _check_layout(path, arrays, spec)
        return write_requests(
            path,
            out,
            spec,
            _requests(path, arrays),
            importer="npz",
            has_weights="probs" in arrays,
            has_prompts="prompt_tokens" in arrays,
        )


def _open(path: Path, archive: zipfile.ZipFile) -> dict[str, ArrayStream]:
    there = set(archive.namelist())
    missing = [name for name in _NAMES if f"{name}.npy" not in there]
    if missing:
        raise UserError(f"{path} holds no array {missing[0]!r}; it must hold {LAYOUT}")
    return {name: ArrayStream(path, archive, name) for name in (*_NAMES, *_OPTIONAL) if f"{name}.npy" in there}


def _check_layout(path: Path, arrays: dict[str, ArrayStream], spec: MoESpec) -> None:
    """Raise :class:`UserError` where the arrays' shapes or types break the layout or do not fit the model."""
    experts, offsets = arrays["experts"], arrays["offsets"]
    if experts.dtype.kind not in "iu":
        raise UserError(f"{path}: experts must be whole numbers, got {experts.dtype}")
    if len(experts.shape) != 3:
        raise UserError(f"{path}: experts must have axes (token, layer, top-k), got shape {experts.shape}")
    if experts.shape[1:] != (spec.L, spec.K):
        raise UserError(
            f"{path}: experts has {experts.shape[1]} layers and top-{experts.shape[2]}, "
            f"but {spec.name} has {spec.L} MoE layers and top-{spec.K}; choose the right --model or give its shape"
        )
    if not len(experts):
        raise UserError(f"{path} holds 0 tokens")
    if len(offsets.shape) != 1 or offsets.dtype.kind not in "iu" or len(offsets) < 2:
        raise UserError(f"{path}: offsets must be a row of whole numbers, one more than requests, got {offsets.shape}")
    probs = arrays.get("probs")
    if probs is not None and (probs.shape != experts.shape or probs.dtype.kind != "f"):
        raise UserError(f"{path}: probs must be floating-point numbers of shape {experts.shape}, got {probs.shape}")
    requests = len(offsets) - 1
    for name, kinds, length in (
        ("category", "U", requests),
        ("prompt_tokens", "iu", requests),
        ("tokens", "iu", len(experts)),
    ):
        array = arrays.get(name)
        if array is not None and (array.shape != (length,) or array.dtype.kind not in kinds):
            kind = "text" if kinds == "U" else "whole numbers"
            raise UserError(
                f"{path}: {name} must be {length} entries of {kind}, got {array.dtype} of shape {array.shape}"
            )


def _requests(path: Path, arrays: dict[str, ArrayStream]) -> Iterator[ImportedRequest]:
    experts, offsets = arrays["experts"], arrays["offsets"]
    probs, tokens = arrays.get("probs"), arrays.get("tokens")
    prompts, category = arrays.get("prompt_tokens"), arrays.get("category")
    count, last = len(offsets) - 1, int(offsets.take(1)[0])
    wrong = UserError(f"{path}: offsets must start at 0, ascend, and end at the number of tokens, {len(experts)}")
    if last != 0:
        raise wrong
    for first in range(0, count, _BLOCK):
        block = min(_BLOCK, count - first)
        stops = offsets.take(block).astype(np.int64)
        prompt_B = None if prompts is None else prompts.take(block).astype(np.int64)
        category_B = None if category is None else category.take(block)
        if (np.diff(stops, prepend=last) < 1).any() or stops[-1] > len(experts):
            raise wrong
        if first + block == count and stops[-1] != len(experts):
            raise wrong
        for index, stop in enumerate(stops.tolist()):
            rows = stop - last
            last = stop
            yield ImportedRequest(
                topk_TLK=experts.take(rows),
                probs_TLK=None if probs is None else probs.take(rows),
                token_T=None if tokens is None else tokens.take(rows),
                prompt_tokens=0 if prompt_B is None else int(prompt_B[index]),
                category="" if category_B is None else str(category_B[index]),
            )
