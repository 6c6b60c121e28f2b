"""Ours: the tokens' forecast, history and the last iteration in proportions that training data chose.

Each is best somewhere: tokens one layer before a large iteration, history where an iteration is small or far away, the
last iteration where the same requests decode on. Weights are per (layer, distance), phase and size of the iteration;
where validation does not show a gain, history alone remains.

The variance is calibrated on all validation requests, per (layer, distance), phase and size, so that a normal 90 %
interval holds 90 % of new loads (``fit_blend``).

Importing needs torch, NumPy and safetensors only.

Axes: P fitted pairs, H phases (prefill, decode), N sizes, S sources, V variance coefficients, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import Context, FloatArray, Forecast, IntArray, Phase
from moeless.errors import UserError
from moeless.predictors import mixing
from moeless.predictors.base import LoadPredictor, Reads, Wants, not_fitted
from moeless.predictors.shares import history_share, last_share, proportional, share_of
from moeless.predictors.token_level import TokenLevel, missing_inputs
from moeless.predictors.token_table import TokenTable
from moeless.predictors.variance import Variance
from moeless.spec import MoESpec

if TYPE_CHECKING:
    import torch

    from moeless.predictors.fitting import FitInput

Pair = tuple[int, int]
#: The source "layer" of targets that no layer precedes by the distance.
BEFORE = -1


class Blend(LoadPredictor):
    """A token-level method inside, and how it is mixed.

    Args:
        part: the token-level method.
        pairs: (layer, distance) of each row; layer −1 and distance t + 1 mean target t as one of the first layers.
        sizes: tokens at which weights were chosen.
        weight_PHNS: weights of the sources.
        variance_PHNV: scale and spread of the forecast's variance (:class:`~moeless.predictors.variance.Variance`).
        error_PHNX: mean relative L1 on validation, and that of history alone there.
        table: what token ids say of the first layers, None where the trace does not know them.
    """

    name = "blend"
    needs_fitting = True
    #: Layers that nothing precedes have weights of their own.
    forecasts_first = True
    reads: Reads = "topk"

    def __init__(
        self,
        spec: MoESpec,
        part: TokenLevel | None = None,
        pairs: Sequence[Pair] = (),
        sizes: Sequence[int] = (),
        weight_PHNS: NDArray[np.floating[Any]] | None = None,
        variance_PHNV: NDArray[np.floating[Any]] | None = None,
        error_PHNX: NDArray[np.floating[Any]] | None = None,
        table: TokenTable | None = None,
    ) -> None:
        if part is None or weight_PHNS is None or variance_PHNV is None or error_PHNX is None:
            raise not_fitted(self.name)
        super().__init__(spec)
        shape = (len(pairs), 2, len(sizes))
        if weight_PHNS.shape != (*shape, 3) or variance_PHNV.shape != (*shape, 2) or error_PHNX.shape != (*shape, 2):
            raise ValueError(f"weights of shape {weight_PHNS.shape} for {len(pairs)} pairs and {len(sizes)} sizes")
        self.part, self.pairs, self.sizes = part, tuple(pairs), tuple(sizes)
        self._row = {pair: row for row, pair in enumerate(self.pairs)}
        self._weight_PHNS = weight_PHNS.astype(np.float32)
        self._variance_PHNV, self._error_PHNX = variance_PHNV.astype(np.float32), error_PHNX.astype(np.float32)
        self.table = table
        self.reads = part.reads

    @classmethod
    def wants(cls, options: Mapping[str, Any], has_router_inputs: bool) -> Wants:
        """What the part wants that will be inside."""
        from moeless.predictors.fit_blend import part_of

        kind, inner = part_of(options, has_router_inputs)
        wanted: Wants = kind.wants(inner, has_router_inputs)
        return wanted

    @classmethod
    def fit(cls, given: FitInput) -> Blend:
        """Fit on a trace; see :func:`moeless.predictors.fit_blend.fit_blend`."""
        from moeless.predictors.fit_blend import fit_blend

        return fit_blend(given)

    @property
    def token_part(self) -> TokenLevel:
        """The method inside."""
        return self.part

    def predict_topk(self, inputs: NDArray[Any], layer: int, distance: int) -> IntArray:
        """The method inside says which experts single tokens choose."""
        chosen: IntArray = self.part.predict_topk(inputs, layer, distance)
        return chosen

    def to(self, device: str | torch.device) -> Self:
        """The method inside on a device."""
        self.part.to(device)
        return self

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """Mix what is known; see :class:`LoadPredictor`."""
        self._check_target(layer + distance)
        if layer < 0:
            return self._mix(self._by_tokens(context, layer + distance), context, layer, distance)
        if context.tokens == 0 or not self.part.covers(layer, distance):
            return self._mix(None, context, layer, distance)
        inputs = self.part.inputs_of(context)
        if inputs is None:
            raise missing_inputs(self.name, self.reads)
        if self.weights(layer, distance, context.phase, context.tokens)[mixing.TOKENS] == 0.0:
            self.part.check_inputs(inputs, layer, distance)
            return self._mix(None, context, layer, distance)
        return self._mix(self.part.mean_load(inputs, layer, distance), context, layer, distance)

    def _by_tokens(self, context: Context, target: int) -> FloatArray | None:
        """Load shares of a first layer from the token ids, where both are known."""
        if context.token_T is None or self.table is None or not self.table.covers(target):
            return None
        return self.table.share(context.token_T, target)

    def from_tokens(self, mean_E: FloatArray, context: Context, layer: int, distance: int) -> Forecast:
        """The mixture, given the sum over the tokens."""
        return self._mix(mean_E, context, layer, distance)

    def weights(self, layer: int, distance: int, phase: Phase, tokens: int) -> FloatArray:
        """Weights of tokens, history and the last iteration, ``[S]``; history alone where nothing was fitted."""
        row = self._row.get(_key(layer, distance))
        if row is None:
            return np.array([0.0, 1.0, 0.0])
        return mixing.at_size(self.sizes, self._weight_PHNS[row, _column(phase)], tokens)

    def skill(self, layer: int, distance: int, phase: Phase, tokens: int) -> float | None:
        """1 − error / history's error on validation; see :meth:`LoadPredictor.skill`."""
        row = self._row.get(_key(layer, distance))
        if row is None:
            return None
        error, history = mixing.at_size(self.sizes, self._error_PHNX[row, _column(phase)], tokens).tolist()
        return 1.0 - error / history if history > 0 else 0.0

    def _mix(self, mean_E: FloatArray | None, context: Context, layer: int, distance: int) -> Forecast:
        experts = self.spec.E
        shares = (
            None if mean_E is None else share_of(mean_E, experts, "the tokens' forecast"),
            history_share(context, experts),
            last_share(context, experts),
        )
        wanted_S = self.weights(layer, distance, context.phase, context.tokens)
        known_S = np.array([share_E is not None for share_E in shares])
        weight_S = np.where(known_S, wanted_S, 0.0)
        if not known_S.any():
            return self.fallback(context, layer + distance)
        if weight_S.sum() <= 0:
            # what was wanted is not known: history stands in for the others, they for it, the last load last
            weight_S[next(s for s in (mixing.HISTORY, mixing.TOKENS, mixing.LAST) if known_S[s])] = 1.0
        share_E = np.zeros(experts)
        for weight, source_E in zip(weight_S / weight_S.sum(), shares, strict=True):
            if source_E is not None:
                share_E += weight * source_E
        mean_E = proportional(share_E, context.tokens * self.spec.K)
        used = np.flatnonzero(weight_S)
        source = mixing.SOURCES[int(used[0])] if len(used) == 1 and used[0] != mixing.TOKENS else self.name
        variance = self._variance(layer, distance, context.phase, context.tokens)
        return Forecast(mean_E, variance.of(mean_E), context.tokens, source)

    def _variance(self, layer: int, distance: int, phase: Phase, tokens: int) -> Variance:
        row = self._row.get(_key(layer, distance))
        if row is None:
            return Variance()
        scale, spread = mixing.at_size(self.sizes, self._variance_PHNV[row, _column(phase)], tokens).tolist()
        return Variance(scale, spread)

    def settings(self) -> dict[str, Any]:
        """The part, and where weights stand."""
        return {
            "part": self.part.name,
            "part_settings": self.part.settings(),
            "pairs": [list(pair) for pair in self.pairs],
            "sizes": list(self.sizes),
            "sources": list(mixing.SOURCES),
        }

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The part's arrays, the weights, and what they were worth on validation."""
        inner = {f"part.{name}": array for name, array in self.part.tensors().items()}
        inner |= {} if self.table is None else self.table.tensors()
        return inner | {"weight": self._weight_PHNS, "variance": self._variance_PHNV, "error": self._error_PHNX}

    @classmethod
    def from_state(cls, spec: MoESpec, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild."""
        from moeless.predictors import PREDICTORS

        inner = {name.removeprefix("part."): array for name, array in tensors.items() if name.startswith("part.")}
        part = PREDICTORS.get(str(settings["part"])).from_state(spec, settings["part_settings"], inner)
        if not isinstance(part, TokenLevel):
            raise UserError(f"a blend cannot hold predictor {settings['part']!r}, which forecasts no tokens")
        return cls(
            spec,
            part,
            [(int(layer), int(d)) for layer, d in settings["pairs"]],
            [int(size) for size in settings["sizes"]],
            tensors["weight"],
            tensors["variance"],
            tensors["error"],
            TokenTable.of(tensors),
        )


def _key(layer: int, distance: int) -> Pair:
    """Targets that no layer precedes by the distance are one pair, however far back the source would be."""
    return (layer, distance) if layer >= 0 else (BEFORE, layer + distance + 1)


def _column(phase: Phase) -> int:
    """A mixed iteration is mostly prompts, by tokens."""
    return int(phase == Phase.DECODE)
