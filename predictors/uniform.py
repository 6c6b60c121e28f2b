"""The predictor that knows nothing: equal shares."""

from __future__ import annotations

import numpy as np

from moeless.contracts import Context, Forecast
from moeless.predictors.base import LoadPredictor


class Uniform(LoadPredictor):
    """Every expert gets ``tokens * K / E``; the variance is that of assignments drawn at random."""

    name = "none"

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """Equal loads; see :class:`LoadPredictor`."""
        self._check_target(layer + distance)
        mean_E = np.full(self.spec.E, context.tokens * self.spec.K / self.spec.E)
        return Forecast(mean_E, mean_E * (1 - self.spec.K / self.spec.E), context.tokens, "uniform")
