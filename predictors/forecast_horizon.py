"""How many iterations what a forecast says stays so: what a planner may weigh against the time of bringing copies.

A forecast of the coming iteration says more than the past does, but not for long: the requests of a prefill are gone
with it, those of a decode step stay for a while. Let a forecast's deviation from history fade by a factor r from one
iteration of a phase to the next. Gaining g now is then worth g / (1 - r) over its life. r is estimated as the run goes,
by the regression of each deviation on the one before, over all layers. A forecast from the past itself has no such end.

Axes: E experts, L layers.
"""

from __future__ import annotations

import numpy as np

from moeless.contracts import FloatArray, Forecast, Phase

#: Weight that past deviations keep, a layer's forecast at a time.
DECAY = 0.999
#: Movement of the past itself, in shares, after which what a forecast says is taken to be there to stay.
SETTLED = 0.05
#: The longest life that is told.
LONGEST = 256


class ForecastHorizon:
    """The rule for one policy's forecasts, of one run.

    Args:
        deployed_LE: load shares that the first plans were made for.
    """

    def __init__(self, deployed_LE: FloatArray) -> None:
        self._settled_LE = np.array(deployed_LE, np.float64)
        self._last: dict[tuple[int, Phase], FloatArray] = {}
        # sums of deviations times those before them, and of these squared
        self._sums: dict[Phase, FloatArray] = {}

    def horizon(self, layer: int, phase: Phase, forecast: Forecast, history_E: FloatArray | None) -> int:
        """``PlanInput.horizon_iterations`` for a plan from this forecast; 0 where it has no end that could be told.

        Args:
            history_E: the layer's past load shares, None before there are any.
        """
        total = forecast.mean_E.sum()
        if forecast.source == "history" or history_E is None or total <= 0:
            return 0
        deviation_E = forecast.mean_E / total - history_E
        sums = self._sums.setdefault(phase, np.zeros(2))
        last_E = self._last.get((layer, phase))
        self._last[layer, phase] = deviation_E
        if last_E is not None:
            sums *= DECAY
            sums += deviation_E @ last_E, last_E @ last_E
        if np.abs(history_E - self._settled_LE[layer]).sum() > SETTLED:
            self._settled_LE[layer] = history_E
            return 0
        return self.life(phase)

    def life(self, phase: Phase) -> int:
        """Iterations over which a phase's forecasts pay, as known so far; 1 before anything is known."""
        together, power = self._sums.get(phase, np.zeros(2))
        fades = min(max(together / power, 0.0), 1.0 - 1.0 / LONGEST) if power > 0.0 else 0.0
        return round(1.0 / (1.0 - fades))
