"""Forecasts of single tokens, computed once for many rows and summed over any iteration made of them.

Axes: T tokens, E experts, K experts per token, I iterations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """The part of each row in the forecast of each (layer, distance).

    Gate inputs are read once, in blocks, for all pairs, and the forecasts kept: in memory up to ``LOADS_BYTES``, else
    in a scratch file. Forecasts from expert ids, which are in memory anyway, are computed when a pair is asked for.
    """

    def __init__(self, predictor: TokenLevel, rows: Rows, row_T: IntArray, pairs: Sequence[Pair]) -> None:
        self.predictor, self.rows, self.row_T = predictor, rows, np.sort(row_T)
        self._ids: Mapping[Pair, NDArray[Any]] = {}
        self._loads: Mapping[Pair, NDArray[Any]] = {}
        if predictor.reads != "router_inputs":
            return
        covered = [pair for pair in pairs if predictor.covers(*pair)]
        self._ids = self._room(covered, rows.spec.K, np.uint16)
        if predictor.counting == "probability":
            # otherwise a token counts 1 for each expert forecast, so the ids are enough and take less memory
            self._loads = self._room(covered, rows.spec.E, np.float32)
        size = max(16, min(BLOCK_TOKENS, BLOCK_BYTES // (4 * rows.spec.L * rows.spec.hidden_size)))
        for start in range(0, len(self.row_T), size):
            here = slice(start, start + size)
            input_TLH = torch.from_numpy(rows.inputs(self.row_T[here]))
            for pair in covered:
                self._ids[pair][here] = predictor.predict_topk(input_TLH[:, pair[0]], *pair)
                if self._loads:
                    self._loads[pair][here] = predictor.token_loads(input_TLH[:, pair[0]], *pair)

    def _room(self, pairs: Sequence[Pair], width: int, kind: type[np.generic]) -> Mapping[Pair, NDArray[Any]]:
        """Arrays ``[T, width]`` by pair, in a scratch file if they are large."""
        shape, dtype = (len(pairs), len(self.row_T), width), np.dtype(kind)
        few = dtype.itemsize * int(np.prod(shape)) <= LOADS_BYTES
        return dict(zip(pairs, np.empty(shape, dtype) if few else scratch_array(shape, dtype), strict=True))

    def has(self, row_T: IntArray) -> bool:
        """Whether all those rows were forecast."""
        return bool(np.isin(row_T, self.row_T).all())

    def of(self, layer: int, distance: int) -> NDArray[np.float32]:
        """All rows' loads of a pair, f32 ``[T, E]``, in the order of :attr:`row_T`."""
        pair = layer, distance
        if pair in self._loads:
            return self._loads[pair]
        if pair not in self._ids:
            return self._from_ids(self.predictor.token_loads, *pair)
        marked_TE = np.zeros((len(self.row_T), self.rows.spec.E), np.float32)
        np.put_along_axis(marked_TE, self._ids[pair].astype(np.int64), 1.0, 1)
        return marked_TE

    def hits(self, layer: int, distance: int) -> FloatArray:
        """Share of each row's experts that were forecast, ``[T]``, in the order of :attr:`row_T`."""
        ids_TK = self._ids.get((layer, distance))
        if ids_TK is None:
            # where a forecast depends on the other tokens, consecutive rows stand for an iteration
            size = 512 if self.predictor.batch_context else IDS_TOKENS
            ids_TK = self._from_ids(self.predictor.predict_topk, layer, distance, size)
        return self.rows.found(ids_TK.astype(np.int64), self.row_T, layer + distance)

    def _from_ids(self, forecast: Any, layer: int, distance: int, size: int = IDS_TOKENS) -> NDArray[Any]:
        """Forecasts of all rows from the source layer's expert ids, ``size`` rows at a time."""
        parts = [self.row_T[start : start + size] for start in range(0, len(self.row_T), size)]
        return np.concatenate([forecast(self.rows.topk_TLK[row_T, layer], layer, distance) for row_T in parts])

    def sums(self, rows_I: Sequence[IntArray], layer: int, distance: int) -> FloatArray:
        """Forecast load of each iteration, ``[I, E]``."""
        if self.predictor.batch_context:
            topk_TK = self.rows.topk_TLK[:, layer]
            return np.stack([self.predictor.mean_load(topk_TK[row_T], layer, distance) for row_T in rows_I])
        load_TE = self.of(layer, distance)
        return np.stack([load_TE[np.searchsorted(self.row_T, row_T)].sum(0, dtype=np.float64) for row_T in rows_I])
