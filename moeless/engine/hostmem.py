"""Every expert's weights once per machine, in memory that its ranks share.

The mapping is a file in the machine's memory file system, or in a folder for temporary files where that has no room. It
has a name only until every rank has mapped it, so that nothing is left of it however the ranks end.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from moeless.engine.exchange import Exchange
from moeless.engine.groups import from_all
from moeless.errors import RunFailed


class HostExperts:
    """All experts' weights as one ``[L, E, values]`` mapping.

    Args:
        path: the file; created by whoever comes first, of the same size for all.
        shapes: name and shape of every weight of one expert; they lie one after the other.
    """

    def __init__(
        self,
        path: Path,
        layers: int,
        experts: int,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
    ) -> None:
        self.shapes, self.num_experts = dict(shapes), experts
        self._sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        self.values, self.dtype = sum(self._sizes.values()), dtype
        self.expert_bytes = self.values * dtype.itemsize
        flat = torch.from_file(str(path), shared=True, size=layers * experts * self.values, dtype=dtype)
        self._weights = flat.view(layers, experts, self.values)

    def pin(self) -> None:
        """Page-lock the mapping for asynchronous copies to a GPU.

        Raises:
            MemoryError: the system does not allow it.
        """
        num_bytes = self._weights.numel() * self.dtype.itemsize
        if int(torch.cuda.cudart().cudaHostRegister(self._weights.data_ptr(), num_bytes, 0)) != 0:
            raise MemoryError(f"the host mapping of {num_bytes:,} bytes cannot be page-locked")

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


def shared_experts(
    folder: Path,
    layers: int,
    experts: int,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    exchange: Exchange,
) -> HostExperts:
    """One mapping for all ranks of a machine, with room reserved for all of it; every rank calls this at once.

    The name is chosen by the machine's first rank. Writing into memory that is not there would end a rank by a signal:
    the ranks reserve the file's blocks between them before any of them writes.

    Args:
        folder: where the file is made; the first rank's counts.

    Raises:
        RunFailed: the file cannot be made, or its folder has no room.
    """
    ranks = exchange.ranks
    num_bytes = layers * experts * sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    made = _create(folder) if ranks.local_rank == 0 else None
    path = made
    try:
        path = Path(from_all(ranks, str(made))[ranks.first_local])
        mapped = HostExperts(path, layers, experts, shapes, dtype)
        with path.open("r+b") as file:
            exchange.barrier()
            path.unlink(missing_ok=True)
            edges = [num_bytes * index // ranks.local_world for index in range(ranks.local_world + 1)]
            reserve(file.fileno(), edges[ranks.local_rank], edges[ranks.local_rank + 1], path.parent, num_bytes)
    finally:
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    exchange.barrier()
    return mapped


def _create(folder: Path) -> Path:
    try:
        handle, name = tempfile.mkstemp(prefix=f"moeless-{os.getuid()}-", dir=folder)
    except OSError as error:
        raise RunFailed(f"the experts' file cannot be made in {folder} ({error.strerror})") from error
    os.close(handle)
    return Path(name)


def reserve(file: int, start: int, stop: int, folder: Path, num_bytes: int) -> None:
    """Give a part of an open file its blocks.

    Args:
        folder, num_bytes: where the file lies, and how large it is as a whole.

    Raises:
        RunFailed: the file system has no room for them.
    """
    if stop <= start or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, start, stop - start)
    except OSError as error:
        raise RunFailed(
            f"the experts' {num_bytes / 1e6:,.0f} MB found no room in {folder} ({error.strerror}); someone else may "
            "have taken it since the run began: free some, or choose another folder (MOELESS_SHM)"
        ) from error
