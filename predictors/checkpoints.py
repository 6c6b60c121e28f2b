"""Where a fit stands, on disk after every epoch, so that a killed one goes on and ends in the same bytes.

A fit to ``DIR`` keeps its state in ``DIR.partial`` until it is done: one file a stage (the search's fits, the fit
proper), and the request that it belongs to. The same request again goes on from there; another one starts anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeless.errors import UserError
from moeless.files import read_json, write_atomic, write_json

REQUEST_FILE = "request.json"


@dataclass(frozen=True)
class Checkpoint:
    """One stage's file; it appears with the first epoch."""

    path: Path

    def save(self, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> None:
        """Replace the state on disk, whole or not at all."""
        from safetensors.torch import save_file

        held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        write_atomic(self.path, lambda partial: save_file(held, partial, {"notes": json.dumps(dict(notes))}))

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors and notes of the last epoch; None where there is none that can be read."""
        from safetensors import SafetensorError, safe_open

        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                return tensors, json.loads((file.metadata() or {})["notes"])
        except (SafetensorError, OSError, KeyError, ValueError):
            return None


@dataclass(frozen=True)
class Checkpoints:
    """All stages of one fit.

    Args:
        folder: ``DIR.partial``.
        request: what is fitted on what; a folder of another request is thrown away.
    """

    folder: Path
    request: Mapping[str, Any]

    @classmethod
    def beside(cls, out: Path, request: Mapping[str, Any]) -> Checkpoints:
        """Those of a fit to ``out``."""
        made = cls(out.with_name(f"{out.name}.partial"), json.loads(json.dumps(dict(request), default=str)))
        if made.folder.is_dir() and made._belongs() is False:
            made.clear()
        return made

    def _belongs(self) -> bool:
        try:
            return bool(read_json(self.folder / REQUEST_FILE) == self.request)
        except UserError:
            return False

    def stage(self, name: str) -> Checkpoint:
        """The checkpoint of one stage, by a name that is unique within the fit."""
        if not (self.folder / REQUEST_FILE).is_file():
            write_json(self.folder / REQUEST_FILE, self.request)
        return Checkpoint(self.folder / f"{name}.safetensors")

    def clear(self) -> None:
        """Forget everything: the fit is done, or was refused."""
        shutil.rmtree(self.folder, ignore_errors=True)
