"""What each gate saw: ``router_inputs-*.safetensors``, one file per shard of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.errors import UserError
from moeless.files import reading, write_atomic
from moeless.spec import MoESpec
from moeless.traces.info import Shard

NAME = "router_inputs"


def write_inputs(path: Path, input_TLH: Any) -> None:
    """Write a torch tensor ``[T, L, H]`` of float16 or bfloat16 atomically."""
    from safetensors.torch import save_file

    write_atomic(path, lambda partial: save_file({NAME: input_TLH.contiguous()}, partial))


class RouterInputs:
    """Rows over all router-input files of a trace."""

    def __init__(self, folder: Path, files: tuple[Shard, ...], spec: MoESpec) -> None:
        self._files = [folder / entry.file for entry in files]
        self._starts = np.concatenate([[0], np.cumsum([entry.rows for entry in files])]).astype(np.int64)
        self._shape = (spec.L, spec.hidden_size)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start`` to ``stop``, f32 ``[stop-start, L, H]``.

        Raises:
            UserError: a file has another shape than the trace says.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        parts: list[Any] = []
        for index, path in enumerate(self._files):
            low, high = max(start, int(self._starts[index])), min(stop, int(self._starts[index + 1]))
            if low >= high:
                continue
            try:
                with reading(path), safe_open(path, framework="pt") as file:
                    piece = file.get_slice(NAME)
                    shape = tuple(piece.get_shape())
                    if shape != (int(self._starts[index + 1] - self._starts[index]), *self._shape):
                        raise UserError(f"{path} has shape {shape}, which does not fit its trace")
                    first = int(self._starts[index])
                    parts.append(piece[low - first : high - first].to(torch.float32).numpy())
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read ({error}); copy or record the trace again") from None
        if not parts:
            return np.empty((0, *self._shape), np.float32)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]
