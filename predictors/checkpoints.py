"""Where a fit stands, on disk after every epoch, so that a killed one goes on and ends in the same bytes.

A fit to ``DIR`` keeps its state in ``DIR.partial`` until it is done: one file a stage (the search's fits, the fit
proper), and the request that it belongs to. The same request again goes on from there; another one starts anew.
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
    """All stages of the fit to ``out``.

    Args:
        request: what is fitted on what; the state of another request is thrown away.
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
        """Replace a stage's state (tensors and plain values), whole or not at all."""
        if not self._file.is_file():
            write_json(self._file, self._request)
        write_atomic(self._folder / f"{stage}.pt", lambda partial: torch.save(dict(state), partial))

    def load(self, stage: str) -> dict[str, Any] | None:
        """The state of a stage's last epoch; None where there is none that can be read, on the host."""
        try:
            state: dict[str, Any] = torch.load(self._folder / f"{stage}.pt", "cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError):
            return None
        return state

    def clear(self) -> None:
        """Forget everything: the fit is done, or was refused."""
        shutil.rmtree(self._folder, ignore_errors=True)
