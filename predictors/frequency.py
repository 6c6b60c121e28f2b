"""The predictor that expects what training requests did, whatever happens at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import Context, Forecast
from moeless.predictors.base import LoadPredictor, not_fitted
from moeless.predictors.shares import proportional
from moeless.spec import MoESpec

if TYPE_CHECKING:
    from moeless.predictors.fitting import FitInput


class Frequency(LoadPredictor):
    """Each expert's share of the training requests' assignments, ``[L, E]``."""

    name = "frequency"
    needs_fitting = True

    def __init__(self, spec: MoESpec, share_LE: NDArray[Any] | None = None) -> None:
        if share_LE is None:
            raise not_fitted(self.name)
        super().__init__(spec)
        if share_LE.shape != (spec.L, spec.E):
            raise ValueError(f"shares of shape {share_LE.shape}")
        self._share_LE = share_LE.astype(np.float32)

    @classmethod
    def fit(cls, given: FitInput) -> Frequency:
        """Count."""
        return cls(given.rows.spec, given.rows.share_LE(given.split.train))

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """The training share; see :class:`LoadPredictor`."""
        self._check_target(layer + distance)
        share_E = self._share_LE[layer + distance].astype(np.float64)
        mean_E = proportional(share_E, context.tokens * self.spec.K)
        return Forecast(mean_E, mean_E.copy(), context.tokens, self.name)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The shares."""
        return {"share": self._share_LE}

    @classmethod
    def from_state(cls, spec: MoESpec, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild."""
        del settings
        return cls(spec, tensors["share"])
