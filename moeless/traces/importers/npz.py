"""Importer of the documented NPZ layout: ``experts [T,L,K]``, ``offsets [N+1]``, optional ``probs``, ``category``."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.errors import UserError
from moeless.files import folder_atomic, sha256
from moeless.spec import MoESpec
from moeless.traces.info import TraceInfo
from moeless.traces.writers import RequestRows, TokenTraceWriter

LAYOUT = "experts [tokens, layers, top-k], offsets [requests + 1] and optionally probs, category, prompt_tokens, tokens"
_OPTIONAL = ("probs", "category", "prompt_tokens", "tokens")


def read_arrays(path: Path, names: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, NDArray[Any]]:
    """Arrays of an NPZ file; pickled objects are never executed.

    Raises:
        UserError: the file is missing, cut short, no NPZ, lacks an array, or holds pickled objects.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; an NPZ file with {LAYOUT} is needed")
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UserError(f"{path} is not an NPZ archive; it must hold {LAYOUT}")
            missing = [name for name in names if name not in file.files]
            if missing:
                raise UserError(f"{path} holds no array {missing[0]!r}; it must hold {LAYOUT}")
            return {name: file[name] for name in (*names, *optional) if name in file.files}
    except UserError:
        raise
    except ValueError as error:
        if "allow_pickle" in str(error) or "pickle" in str(error).lower():
            raise UserError(f"{path} holds pickled Python objects, which are not read; save plain arrays") from None
        raise UserError(f"{path} cannot be read as NPZ ({_line(error)})") from None
    except (zipfile.BadZipFile, OSError, EOFError, KeyError, zipfile.error) as error:
        raise UserError(f"{path} is not a whole NPZ archive ({_line(error)})") from None


def import_npz(path: Path, out: Path, spec: MoESpec) -> TraceInfo:
    """Write a token trace from an NPZ file of that model.

    Without ``prompt_tokens`` all rows count as generated tokens (phase 1), as in recordings of answers only.

    Raises:
        UserError: the file breaks the layout or does not fit the model, or ``out`` cannot be written.
    """
    arrays = read_arrays(path, ("experts", "offsets"), _OPTIONAL)
    check_layout(path, arrays, spec)
    return write_requests(path, out, spec, arrays, importer="npz")


def check_layout(path: Path, arrays: dict[str, NDArray[Any]], spec: MoESpec) -> None:
    """Raise :class:`UserError` where the arrays break the layout or do not fit the model."""
    experts, offsets = arrays["experts"], arrays["offsets"]
    if experts.dtype.kind not in "iu":
        raise UserError(f"{path}: experts must be whole numbers, got {experts.dtype}")
    if experts.ndim != 3:
        raise UserError(f"{path}: experts must have axes (token, layer, top-k), got shape {experts.shape}")
    if experts.shape[1:] != (spec.L, spec.K):
        raise UserError(
            f"{path}: experts has {experts.shape[1]} layers and top-{experts.shape[2]}, "
            f"but {spec.name} has {spec.L} MoE layers and top-{spec.K}; choose the right --model or give its shape"
        )
    if not len(experts):
        raise UserError(f"{path} holds 0 tokens")
    low, high = int(experts.min()), int(experts.max())
    if low < 0 or high >= spec.E:
        raise UserError(f"{path}: expert ids must lie in 0..{spec.E - 1}, got {low if low < 0 else high}")
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or len(offsets) < 2:
        raise UserError(f"{path}: offsets must be a row of whole numbers, one more than requests, got {offsets.shape}")
    steps = offsets.astype(np.int64)
    if steps[0] != 0 or steps[-1] != len(experts) or (np.diff(steps) < 1).any():
        raise UserError(f"{path}: offsets must start at 0, ascend, and end at the number of tokens, {len(experts)}")
    probs = arrays.get("probs")
    if probs is not None:
        if probs.shape != experts.shape or probs.dtype.kind != "f":
            raise UserError(f"{path}: probs must be floating-point numbers of shape {experts.shape}, got {probs.shape}")
        if not np.isfinite(probs).all():
            raise UserError(f"{path}: probs holds values that are not finite")
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
    prompts = arrays.get("prompt_tokens")
    if prompts is not None and ((prompts < 0).any() or (prompts > np.diff(steps)).any()):
        raise UserError(f"{path}: prompt_tokens must lie between 0 and the request's number of tokens")


def write_requests(
    path: Path, out: Path, spec: MoESpec, arrays: dict[str, NDArray[Any]], *, importer: str
) -> TraceInfo:
    """Write checked arrays as a token trace at ``out``, which appears only when whole."""
    experts, offsets, probs = arrays["experts"], arrays["offsets"].astype(np.int64), arrays.get("probs")
    prompts, tokens, category = arrays.get("prompt_tokens"), arrays.get("tokens"), arrays.get("category")
    notes = () if prompts is not None else ("generated tokens only: prompts were not recorded",)
    info = TraceInfo(
        kind="tokens",
        spec=spec,
        source={"importer": importer, "file": path.name, "sha256": sha256(path)},
        has_weights=probs is not None,
        notes=notes,
    )
    with folder_atomic(out) as folder:
        writer = TokenTraceWriter(folder, info)
        for request in range(len(offsets) - 1):
            start, stop = int(offsets[request]), int(offsets[request + 1])
            prompt = 0 if prompts is None else int(prompts[request])
            writer.append(
                [
                    RequestRows(
                        request=request,
                        topk_TLK=experts[start:stop],
                        weights_TLK=None if probs is None else probs[start:stop],
                        token_T=None if tokens is None else tokens[start:stop],
                        prompt_tokens=prompt,
                        output_tokens=stop - start - prompt,
                        category="" if category is None else str(category[request]),
                    )
                ]
            )
        return writer.close()


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
