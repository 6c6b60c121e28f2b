"""Per-token forecasts of many rows, computed once, summed over any iteration composed of them.

Axes: T tokens, E experts, I iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import FloatArray, IntArray
from moeless.predictors.data import BLOCK_TOKENS, Rows
from moeless.predictors.token_level import TokenLevel

Pair = tuple[int, int]


class TokenLoads:
    """What each row adds to the forecast of each (layer, distance).

    Gate inputs are read once, in blocks, for all pairs; expert ids, which are in memory, when a pair is asked for.
    """

    def __init__(self, predictor: TokenLevel, rows: Rows, row_T: IntArray, pairs: Sequence[Pair]) -> None:
        self.predictor, self.rows = predictor, rows
        self.row_T = np.sort(row_T)
        self._loads: dict[Pair, NDArray[np.float32]] = {}
        self._hits: dict[Pair, FloatArray] = {}
        if predictor.reads == "router_inputs":
            parts: dict[Pair, list[Any]] = {pair: [] for pair in pairs if predictor.covers(*pair)}
            found: dict[Pair, list[Any]] = {pair: [] for pair in parts}
            for start in range(0, len(self.row_T), BLOCK_TOKENS):
                row_T = self.row_T[start : start + BLOCK_TOKENS]
                input_TLH = rows.inputs(row_T)
                for pair, made in parts.items():
                    made.append(predictor.token_loads(input_TLH[:, pair[0]], *pair))
                    found[pair].append(self._found(input_TLH[:, pair[0]], row_T, *pair))
            self._loads = {pair: np.concatenate(made) for pair, made in parts.items() if made}
            self._hits = {pair: np.concatenate(made) for pair, made in found.items() if made}

    def has(self, row_T: IntArray) -> bool:
        """Whether all those rows are among the ones forecast."""
        at = np.searchsorted(self.row_T, row_T)
        return bool((at < len(self.row_T)).all() and (self.row_T[at] == row_T).all())

    def of(self, layer: int, distance: int) -> NDArray[np.float32]:
        """All rows' loads of a pair, f32 ``[T, E]``, in the order of :attr:`row_T`."""
        if (layer, distance) in self._loads:
            return self._loads[layer, distance]
        parts = [
            self.predictor.token_loads(self.rows.topk_TLK[self.row_T[start : start + 16384], layer], layer, distance)
            for start in range(0, len(self.row_T), 16384)
        ]
        return np.concatenate(parts)

    def hits(self, layer: int, distance: int) -> FloatArray:
        """Share of each row's experts that were forecast, ``[T]``, in the order of :attr:`row_T`."""
        if (layer, distance) in self._hits:
            return self._hits[layer, distance]
        parts = []
        # consecutive rows as one iteration, where a token's forecast depends on its neighbours
        size = 512 if self.predictor.batch_context else 16384
        for start in range(0, len(self.row_T), size):
            row_T = self.row_T[start : start + size]
            parts.append(self._found(self.rows.topk_TLK[row_T, layer], row_T, layer, distance))
        return np.concatenate(parts)

    def _found(self, inputs: NDArray[Any], row_T: IntArray, layer: int, distance: int) -> FloatArray:
        true_TK = self.rows.topk_TLK[row_T, layer + distance].astype(np.int64)
        chosen_TK = self.predictor.predict_topk(inputs, layer, distance)
        return np.asarray((true_TK[:, :, None] == chosen_TK[:, None, :]).any(2).mean(1))

    def sums(self, windows: Sequence[IntArray], layer: int, distance: int) -> FloatArray:
        """Forecast load of each iteration, ``[I, E]``."""
        if self.predictor.batch_context:
            topk_TK = self.rows.topk_TLK[:, layer]
            return np.stack([self.predictor.mean_load(topk_TK[row_T], layer, distance) for row_T in windows])
        load_TE = self.of(layer, distance)
        return np.stack([load_TE[np.searchsorted(self.row_T, row_T)].sum(0, dtype=np.float64) for row_T in windows])
