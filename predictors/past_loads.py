"""Predictors that know loads and nothing of the iteration's tokens: its past, training requests, or the truth.

Axes: L MoE layers, E experts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import Context, FloatArray, Forecast, Phase
from moeless.errors import UserError
from moeless.predictors.base import LoadPredictor, share_of
from moeless.spec import MoESpec

if TYPE_CHECKING:
    from moeless.predictors.fitting import FitInput


class KnownLoads(LoadPredictor):
    """A known load, scaled to the iteration's tokens; what :meth:`LoadPredictor.fallback` knows where there is none.

    Attributes:
        variance: of a forecast, over its mean; 1 is that of a Poisson count.
    """

    variance: ClassVar[float] = 1.0

    @abstractmethod
    def share(self, context: Context, target: int) -> FloatArray | None:
        """Load shares ``[E]`` of the target layer, None where the source has none."""

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """The load that is known; see :class:`LoadPredictor`."""
        self._check_target(layer + distance)
        share_E = self.share(context, layer + distance)
        if share_E is None:
            return self.fallback(context, layer + distance)
        return self.scaled(share_E, context.tokens, self.name, self.variance)


class Uniform(LoadPredictor):
    """Every expert gets ``tokens * K / E``; the variance is that of assignments drawn at random."""

    name = "none"

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """Equal loads; see :class:`LoadPredictor`."""
        self._check_target(layer + distance)
        mean_E = np.full(self.spec.E, context.tokens * self.spec.K / self.spec.E)
        return Forecast(mean_E, mean_E * (1 - self.spec.K / self.spec.E), context.tokens, "uniform")


class History(LoadPredictor):
    """The target layer's mean load share so far, as EPLB expects it."""

    name = "history"
    from_history = True

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """Mean share of the past; see :class:`LoadPredictor`."""
        return self.fallback(context, layer + distance)


class Window(KnownLoads):
    """The target layer's mean load share over a window of recent iterations, as EPLB is fed in vLLM."""

    name = "window"

    def share(self, context: Context, target: int) -> FloatArray | None:
        """The window's mean."""
        return share_of(context.recent_E, self.spec.E, "the recent load")


class Last(KnownLoads):
    """The target layer's load in the previous iteration of this phase."""

    name = "last"
    # both loads vary: their difference has the variance of two
    variance = 2.0

    def share(self, context: Context, target: int) -> FloatArray | None:
        """The last load."""
        return share_of(context.last_load_E, self.spec.E, "the last load")


class Oracle(KnownLoads):
    """The target layer's true load with no variance, as an upper bound: only simulations and replays can know it."""

    name = "oracle"
    reads = "true_load"
    variance = 0.0

    def skill(self, layer: int, distance: int, phase: Phase, tokens: int) -> float | None:
        """Exact at any distance; before the iteration it would be exact as well, which no run can be."""
        return 1.0 if layer >= 0 else 0.0

    def share(self, context: Context, target: int) -> FloatArray | None:
        """The truth.

        Raises:
            UserError: the context does not hold the true load.
        """
        if context.true_load_E is None:
            raise UserError("predictor 'oracle' needs the true load, which is known in simulations only")
        return share_of(context.true_load_E, self.spec.E, "the true load")


class Frequency(KnownLoads):
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
        """Count."""
        return cls(given.rows.spec, given.rows.share_LE(given.split.train))

    def share(self, context: Context, target: int) -> FloatArray | None:
        """The training share."""
        return np.asarray(self._share_LE[target], np.float64)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The shares."""
        return {"share": self._share_LE}

    @classmethod
    def from_state(
        cls,
        spec: MoESpec,
        settings: Mapping[str, Any],  # noqa: ARG003
        tensors: Mapping[str, NDArray[Any]],
    ) -> Self:
        """Rebuild."""
        return cls(spec, tensors["share"])
