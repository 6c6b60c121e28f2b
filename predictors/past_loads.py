"""Predictors that read loads only, not the iteration's tokens: past loads, training loads or the true load.

Axes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import Context, Forecast, Phase
from moeless.errors import UserError
from moeless.predictors.base import LoadPredictor
from moeless.spec import MoESpec

if TYPE_CHECKING:
    from moeless.predictors.fitting import FitInput


class Uniform(LoadPredictor):
    """Every expert gets ``tokens * K / E``; the variance is that of assignments drawn at random."""

    name = "none"

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """Equal loads; see :class:`LoadPredictor`."""
        self._check_target(layer + distance)
        return self.scaled(np.ones(self.spec.E), context.tokens, "uniform", 1 - self.spec.K / self.spec.E)


class History(LoadPredictor):
    """The target layer's mean load share so far, as EPLB expects it."""

    name = "history"
    from_history = True

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """Mean share of the past; see :class:`LoadPredictor`."""
        return self.fallback(context, layer + distance)


class Window(LoadPredictor):
    """The target layer's mean load share over a window of recent iterations, as EPLB is fed in vLLM."""

    name = "window"

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """The window's mean; see :class:`LoadPredictor`."""
        return self.expecting(context.recent_E, "the recent load", context, layer + distance)


class Last(LoadPredictor):
    """The target layer's load in the previous iteration of this phase."""

    name = "last"

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """The last load; see :class:`LoadPredictor`."""
        # both loads vary: their difference has the variance of two
        return self.expecting(context.last_load_E, "the last load", context, layer + distance, 2.0)


class Oracle(LoadPredictor):
    """The target layer's true load with no variance, as an upper bound: only simulations and replays can know it."""

    name = "oracle"
    reads = "true_load"

    def skill(self, layer: int, distance: int, phase: Phase, tokens: int) -> float | None:
        """1 at any distance; 0 before the iteration starts, where no real run can know the load."""
        return 1.0 if layer >= 0 else 0.0

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """The true load.

        Raises:
            UserError: the context does not hold the true load.
        """
        self._check_target(layer + distance)
        if context.true_load_E is None:
            raise UserError("predictor 'oracle' needs the true load, which is known in simulations only")
        return self.expecting(context.true_load_E, "the true load", context, layer + distance, 0.0)


class Frequency(LoadPredictor):
    """Each expert's share of the training requests' assignments, ``[L, E]``, whatever happens at run time."""

    name = "frequency"
    needs_fitting = True

    def __init__(self, spec: MoESpec, share_LE: NDArray[Any]) -> None:
        super().__init__(spec)
        if share_LE.shape != (spec.L, spec.E):
            raise ValueError(f"shares of shape {share_LE.shape}")
        self._share_LE = share_LE.astype(np.float32)

    @classmethod
    def fit(cls, given: FitInput) -> Self:
        """Count the training requests' assignments."""
        return cls(given.rows.spec, given.rows.share_LE(given.split.train))

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """The training share; see :class:`LoadPredictor`."""
        self._check_target(layer + distance)
        return self.scaled(self._share_LE[layer + distance].astype(np.float64), context.tokens, self.name)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The shares, f32 ``[L, E]``."""
        return {"share": self._share_LE}

    @classmethod
    def from_state(
        cls,
        spec: MoESpec,
        settings: Mapping[str, Any],  # noqa: ARG003
        tensors: Mapping[str, NDArray[Any]],
    ) -> Self:
        """See :class:`LoadPredictor`."""
        return cls(spec, tensors["share"])
