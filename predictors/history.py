"""The predictor that expects the past mean, as EPLB does."""

from __future__ import annotations

from moeless.contracts import Context, Forecast
from moeless.predictors.base import LoadPredictor


class History(LoadPredictor):
    """The target layer's mean load share so far, times this iteration's assignments."""

    name = "history"
    from_history = True

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """Mean share of the past; see :class:`LoadPredictor`."""
        return self.fallback(context, layer + distance)
