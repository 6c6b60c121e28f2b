"""The predictor that expects the mean of the last iterations: history that forgets at once."""

from __future__ import annotations

from moeless.contracts import Context, Forecast
from moeless.predictors.base import LoadPredictor
from moeless.predictors.shares import proportional, share_of


class Window(LoadPredictor):
    """The target layer's mean load share over a window of recent iterations, as EPLB is fed in vLLM."""

    name = "window"

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """The window's mean; history where there is none; see :class:`LoadPredictor`."""
        self._check_target(layer + distance)
        recent_E = context.recent_E
        share_E = None if recent_E is None else share_of(recent_E, self.spec.E, "the recent load")
        if share_E is None:
            return self.fallback(context, layer + distance)
        mean_E = proportional(share_E, context.tokens * self.spec.K)
        return Forecast(mean_E, mean_E.copy(), context.tokens, self.name)
