"""Per-token forecasts of many rows, computed once, summed over any iteration composed of them.

Axes: T tokens, E experts, K experts per token, I iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moeless.contracts import FloatArray, IntArray
from moeless.predictors.token_level import Pair, TokenLevel
from moeless.predictors.trace_rows import BLOCK_TOKENS, Rows, scratch_array

#: Bytes of loads that are kept in memory; those of more pairs or tokens go through a scratch file.
LOADS_BYTES = 2**28
#: Bytes of gate inputs that are read at once.
BLOCK_BYTES = 2**28
#: Expert ids that are forecast from at once.
IDS_TOKENS = 16_384


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
        self.predictor, self.rows, self.row_T = predictor, rows, np.sort(row_T)
        # where a token adds one to each expert forecast, ids say all, in a fraction of the memory
        self._ids = predictor.counting == "topk"
        self._kept: dict[Pair, NDArray[Any]] = {}
        self._hits: dict[Pair, NDArray[np.float32]] = {}
        if predictor.reads != "router_inputs":
            return
        covered = [pair for pair in pairs if predictor.covers(*pair)]
        kind = np.dtype(np.uint16 if self._ids else np.float32)
        shape = len(covered), len(self.row_T), rows.spec.K if self._ids else rows.spec.E
        few = kind.itemsize * int(np.prod(shape)) <= LOADS_BYTES
        self._kept = dict(zip(covered, np.empty(shape, kind) if few else scratch_array(shape, kind), strict=True))
        if with_hits and not self._ids:
            self._hits = {pair: np.empty(len(self.row_T), np.float32) for pair in covered}
        size = max(16, min(BLOCK_TOKENS, BLOCK_BYTES // (4 * rows.spec.L * rows.spec.hidden_size)))
        for start in range(0, len(self.row_T), size):
            here = slice(start, start + size)
            input_TLH = torch.from_numpy(rows.inputs(self.row_T[here]))
            for pair, kept in self._kept.items():
                input_TH = input_TLH[:, pair[0]]
                forecast = predictor.predict_topk if self._ids else predictor.token_loads
                kept[here] = forecast(input_TH, *pair)
                if pair in self._hits:
                    self._hits[pair][here] = self._found(input_TH, self.row_T[here], *pair)

    def has(self, row_T: IntArray) -> bool:
        """Whether all those rows are among the ones forecast."""
        return bool(np.isin(row_T, self.row_T).all())

    def of(self, layer: int, distance: int) -> NDArray[np.float32]:
        """All rows' loads of a pair, f32 ``[T, E]``, in the order of :attr:`row_T`."""
        kept = self._kept.get((layer, distance))
        if kept is None:
            topk_TK = self.rows.topk_TLK[self.row_T, layer]
            parts = [topk_TK[start : start + IDS_TOKENS] for start in range(0, len(topk_TK), IDS_TOKENS)]
            return np.concatenate([self.predictor.token_loads(part, layer, distance) for part in parts])
        if not self._ids:
            return kept
        marked_TE = np.zeros((len(kept), self.rows.spec.E), np.float32)
        np.put_along_axis(marked_TE, kept.astype(np.int64), 1.0, 1)
        return marked_TE

    def hits(self, layer: int, distance: int) -> FloatArray:
        """Share of each row's experts that were forecast, ``[T]``, in the order of :attr:`row_T`."""
        pair = layer, distance
        if pair in self._hits:
            return self._hits[pair].astype(np.float64)
        if pair in self._kept:
            return self.rows.found(self._kept[pair].astype(np.int64), self.row_T, layer + distance)
        # consecutive rows as one iteration, where a token's forecast depends on its neighbours
        size = 512 if self.predictor.batch_context else IDS_TOKENS
        parts = [self.row_T[start : start + size] for start in range(0, len(self.row_T), size)]
        return np.concatenate([self._found(self.rows.topk_TLK[row_T, layer], row_T, *pair) for row_T in parts])

    def _found(self, inputs: Any, row_T: IntArray, layer: int, distance: int) -> FloatArray:
        return self.rows.found(self.predictor.predict_topk(inputs, layer, distance), row_T, layer + distance)

    def sums(self, rows_I: Sequence[IntArray], layer: int, distance: int) -> FloatArray:
        """Forecast load of each iteration, ``[I, E]``."""
        if self.predictor.batch_context:
            topk_TK = self.rows.topk_TLK[:, layer]
            return np.stack([self.predictor.mean_load(topk_TK[row_T], layer, distance) for row_T in rows_I])
        load_TE = self.of(layer, distance)
        return np.stack([load_TE[np.searchsorted(self.row_T, row_T)].sum(0, dtype=np.float64) for row_T in rows_I])
