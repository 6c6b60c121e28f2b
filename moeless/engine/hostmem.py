"""Every expert's weights once per machine, in memory that its ranks share.

The mapping is a file in the machine's memory file system, unlinked once every rank has mapped it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch


class HostExperts:
    """All experts' weights as one ``[L, E, values]`` mapping.

    Args:
        path: the file; created by whoever comes first, of the same size for all.
        shapes: name and shape of every weight of one expert; they lie one after the other.
        pin: page-lock the mapping for asynchronous copies to a GPU.
    """

    def __init__(
        self,
        path: Path,
        layers: int,
        experts: int,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        pin: bool = False,
    ) -> None:
        self.shapes, self.num_experts = dict(shapes), experts
        self._sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        self.values, self.dtype = sum(self._sizes.values()), dtype
        self.expert_bytes = self.values * dtype.itemsize
        flat = torch.from_file(str(path), shared=True, size=layers * experts * self.values, dtype=dtype)
        self._weights = flat.view(layers, experts, self.values)
        if pin:
            code = torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.numel() * dtype.itemsize, 0)
            if int(code) != 0:
                raise MemoryError(f"the host mapping of {flat.numel() * dtype.itemsize:,} bytes cannot be page-locked")

    def view(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """One expert's weights, in place."""
        return self.split(self._weights[layer, expert])

    def split(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weights that lie one after the other in a row of ``values`` numbers."""
        views, start = {}, 0
        for name, size in self._sizes.items():
            views[name] = row[start : start + size].view(self.shapes[name])
            start += size
        return views

    def fill(self, layer: int, expert: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Store one expert."""
        for name, place in self.view(layer, expert).items():
            place.copy_(weights[name])
