"""The predictor that knows the true load, as an upper bound."""

from __future__ import annotations

import numpy as np

from moeless.contracts import Context, Forecast, Phase
from moeless.errors import UserError
from moeless.predictors.base import LoadPredictor
from moeless.predictors.shares import proportional, share_of


class Oracle(LoadPredictor):
    """The target layer's true load with no variance: only simulations and replays can know it."""

    name = "oracle"
    reads = "true_load"

    def skill(self, layer: int, distance: int, phase: Phase, tokens: int) -> float | None:
        """Exact at any distance; before the iteration it would be exact as well, which no run can be."""
        return 1.0 if layer >= 0 else 0.0

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """The truth.

        Raises:
            UserError: the context does not hold the true load.
        """
        self._check_target(layer + distance)
        if context.true_load_E is None:
            raise UserError("predictor 'oracle' needs the true load, which is known in simulations only")
        share_E = share_of(context.true_load_E, self.spec.E, "the true load")
        if share_E is None:
            return self.fallback(context, layer + distance)
        mean_E = proportional(share_E, context.tokens * self.spec.K)
        return Forecast(mean_E, np.zeros(self.spec.E), context.tokens, self.name)
