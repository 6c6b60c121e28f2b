"""The state of a fit, saved after every epoch, so that an interrupted fit can be resumed and ends in the same bytes.

A fit to ``DIR`` keeps its state in ``DIR.partial`` until it is done: one file for each stage (each fit of a search, and
the final one) and the request. The same request resumes the fit; any other request starts anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from moeless.errors import UserError
from moeless.files import read_json, write_atomic, write_json


class Checkpoints:
    """The saved stages of the fit to ``out``.

    Args:
        request: everything that the fit depends on; the state of another request is deleted.
    """

    def __init__(self, out: Path, request: Mapping[str, Any]) -> None:
        self._folder = out.with_name(f"{out.name}.partial")
        self._request = json.loads(json.dumps(dict(request), default=str))
        self._file = self._folder / "request.json"
        try:
            if self._folder.is_dir() and read_json(self._file) != self._request:
                self.clear()
        except UserError:
            self.clear()

    def save(self, stage: str, state: Mapping[str, Any]) -> None:
        """Save a stage's state (tensors and plain values) atomically, in place of the one before."""
        if not self._file.is_file():
            write_json(self._file, self._request)
        write_atomic(self._folder / f"{stage}.pt", lambda partial: torch.save(dict(state), partial))

    def load(self, stage: str) -> dict[str, Any] | None:
        """The state of a stage's last epoch, with tensors on the CPU; None if there is none or it is damaged."""
        try:
            state: dict[str, Any] = torch.load(self._folder / f"{stage}.pt", "cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError):
            return None
        return state

    def clear(self) -> None:
        """Delete the state: the fit is done, or was refused."""
        shutil.rmtree(self._folder, ignore_errors=True)
