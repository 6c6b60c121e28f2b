"""The predictor that expects the previous iteration again."""

from __future__ import annotations

from moeless.contracts import Context, Forecast
from moeless.predictors.base import LoadPredictor
from moeless.predictors.shares import last_share, proportional


class Last(LoadPredictor):
    """The target layer's load in the previous iteration of this phase, scaled to this iteration's tokens."""

    name = "last"

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """The last load; history where there is none; see :class:`LoadPredictor`."""
        self._check_target(layer + distance)
        share_E = last_share(context, self.spec.E)
        if share_E is None:
            return self.fallback(context, layer + distance)
        mean_E = proportional(share_E, context.tokens * self.spec.K)
        # both loads vary: their difference has the variance of two
        return Forecast(mean_E, 2.0 * mean_E, context.tokens, self.name)
