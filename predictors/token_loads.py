"""Per-token forecasts of many rows, computed once, summed over any iteration composed of them.

Axes: T tokens, E experts, I iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moeless.contracts import FloatArray, IntArray
from moeless.predictors.data import BLOCK_TOKENS, Rows, scratch_array
from moeless.predictors.token_level import TokenLevel

Pair = tuple[int, int]


#: Bytes of loads that are kept in memory; those of more pairs or tokens go through a scratch file.
LOADS_BYTES = 2**28
#: Bytes of gate inputs that are read at once.
BLOCK_BYTES = 2**28


class TokenLoads:
    """What each row adds to the forecast of each (layer, distance).

    Gate inputs are read once, in blocks, for all pairs; expert ids, which are in memory, when a pair is asked for. No
    more than ``LOADS_BYTES`` of what all pairs add is held in memory, and one pair's loads.

    Args:
        with_hits: whether :meth:`hits` will be asked for.
    """

    def __init__(
        self, predictor: TokenLevel, rows: Rows, row_T: IntArray, pairs: Sequence[Pair], *, with_hits: bool = False
    ) -> None:
        self.predictor, self.rows = predictor, rows
        self.row_T = np.sort(row_T)
        self._hits: dict[Pair, NDArray[np.float32]] = {}
        #: where each pair's ids or loads stand
        self._at: dict[Pair, int] = {}
        if predictor.reads != "router_inputs":
            return
        self._at = {pair: index for index, pair in enumerate(pair for pair in pairs if predictor.covers(*pair))}
        self._kept = self._room((len(self._at), len(self.row_T), rows.spec.K if self._marks else rows.spec.E))
        if with_hits and not self._marks:
            self._hits = {pair: np.empty(len(self.row_T), np.float32) for pair in self._at}
        size = max(16, min(BLOCK_TOKENS, BLOCK_BYTES // (4 * rows.spec.L * rows.spec.hidden_size)))
        for start in range(0, len(self.row_T), size):
            part_T = self.row_T[start : start + size]
            input_TLH = torch.from_numpy(rows.inputs(part_T))
            for pair, at in self._at.items():
                input_TH = input_TLH[:, pair[0]]
                if self._marks:
                    self._kept[at, start : start + size] = predictor.predict_topk(input_TH, *pair)
                else:
                    self._kept[at, start : start + size] = predictor.token_loads(input_TH, *pair)
                if pair in self._hits:
                    self._hits[pair][start : start + size] = self._found(input_TH, part_T, *pair)

    @property
    def _marks(self) -> bool:
        """Whether a token adds one to each expert forecast: the ids then say all, in a fraction of the memory."""
        return self.predictor.counting == "topk"

    def _room(self, shape: tuple[int, int, int]) -> NDArray[Any]:
        """Ids or loads of all pairs; in a scratch file, gone with the process, where they are many."""
        kind = np.dtype(np.uint16 if self._marks else np.float32)
        if kind.itemsize * int(np.prod(shape)) <= LOADS_BYTES:
            return np.empty(shape, kind)
        return scratch_array(shape, kind)

    def has(self, row_T: IntArray) -> bool:
        """Whether all those rows are among the ones forecast."""
        at = np.searchsorted(self.row_T, row_T)
        return bool((at < len(self.row_T)).all() and (self.row_T[at] == row_T).all())

    def of(self, layer: int, distance: int) -> NDArray[np.float32]:
        """All rows' loads of a pair, f32 ``[T, E]``, in the order of :attr:`row_T`."""
        if (layer, distance) in self._at:
            kept: NDArray[Any] = self._kept[self._at[layer, distance]]
            if not self._marks:
                return kept
            marked_TE = np.zeros((len(kept), self.rows.spec.E), np.float32)
            np.put_along_axis(marked_TE, kept.astype(np.int64), 1.0, 1)
            return marked_TE
        parts = [
            self.predictor.token_loads(self.rows.topk_TLK[self.row_T[start : start + 16384], layer], layer, distance)
            for start in range(0, len(self.row_T), 16384)
        ]
        return np.concatenate(parts)

    def hits(self, layer: int, distance: int) -> FloatArray:
        """Share of each row's experts that were forecast, ``[T]``, in the order of :attr:`row_T`."""
        if (layer, distance) in self._hits:
            return self._hits[layer, distance].astype(np.float64)
        if (layer, distance) in self._at:
            ids_TK = self._kept[self._at[layer, distance]].astype(np.int64)
            return self._share_found(ids_TK, self.row_T, layer + distance)
        parts = []
        # consecutive rows as one iteration, where a token's forecast depends on its neighbours
        size = 512 if self.predictor.batch_context else 16384
        for start in range(0, len(self.row_T), size):
            row_T = self.row_T[start : start + size]
            parts.append(self._found(self.rows.topk_TLK[row_T, layer], row_T, layer, distance))
        return np.concatenate(parts)

    def _found(self, inputs: Any, row_T: IntArray, layer: int, distance: int) -> FloatArray:
        return self._share_found(self.predictor.predict_topk(inputs, layer, distance), row_T, layer + distance)

    def _share_found(self, chosen_TK: IntArray, row_T: IntArray, target: int) -> FloatArray:
        true_TK = self.rows.topk_TLK[row_T, target].astype(np.int64)
        return np.asarray((true_TK[:, :, None] == chosen_TK[:, None, :]).any(2).mean(1))

    def sums(self, windows: Sequence[IntArray], layer: int, distance: int) -> FloatArray:
        """Forecast load of each iteration, ``[I, E]``."""
        if self.predictor.batch_context:
            topk_TK = self.rows.topk_TLK[:, layer]
            return np.stack([self.predictor.mean_load(topk_TK[row_T], layer, distance) for row_T in windows])
        load_TE = self.of(layer, distance)
        return np.stack([load_TE[np.searchsorted(self.row_T, row_T)].sum(0, dtype=np.float64) for row_T in windows])
