"""The collectives of expert parallelism, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from moeless.contracts import IntArray
from moeless.engine.groups import Ranks

#: Newer versions of PyTorch rename it and warn.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Exchange:
    """All-to-all of token rows and gather of control words; one rank needs no messages.

    Attributes:
        calls: collectives by name, since the start.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.calls: Counter[str] = Counter()

    def gather(self, words: IntArray) -> IntArray:
        """Every rank's int64 words, ``[S, n]``; all ranks give the same n."""
        if self.ranks.world == 1:
            return words[None]
        self.calls["gather"] += 1
        mine = torch.from_numpy(np.ascontiguousarray(words, np.int64))
        every = torch.empty((self.ranks.world, len(mine)), dtype=torch.int64)
        _ALL_GATHER(every.view(-1), mine, group=self.ranks.control)
        return every.numpy()

    def all_to_all(self, rows_NH: torch.Tensor, send_G: Sequence[int], receive_S: Sequence[int]) -> torch.Tensor:
        """Send consecutive blocks of rows to the ranks; the received blocks come in order of source rank."""
        if self.ranks.world == 1:
            return rows_NH
        self.calls["all_to_all"] += 1
        out = rows_NH.new_empty((sum(receive_S), *rows_NH.shape[1:]))
        dist.all_to_all_single(out, rows_NH.contiguous(), list(receive_S), list(send_G), group=self.ranks.data)
        return out

    def first_rank(self, value: float) -> float:
        """Rank 0's number, on every rank."""
        if self.ranks.world == 1:
            return value
        self.calls["broadcast"] += 1
        box = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(box, 0, group=self.ranks.control)
        return float(box[0])

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.ranks.world > 1:
            dist.barrier(group=self.ranks.control)
