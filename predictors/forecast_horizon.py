"""For how many iterations a forecast stays useful, which a planner weighs against the time to load copies.

A forecast of the next iteration knows more than history, but not for long: a prefill's requests are gone after it,
those of a decode step stay for a while. Assume that a forecast's deviation from history shrinks by a factor r from one
iteration of a phase to the next. A gain g in this iteration is then worth g / (1 - r) in all. r is estimated during the
run by regressing each deviation on the one before, over all layers. A forecast from history itself has no such limit.

Axes: E experts, L layers.
"""

from __future__ import annotations

import numpy as np

from moeless.contracts import FloatArray, Forecast, Phase

#: Factor by which past deviations lose weight with each forecast of a layer.
DECAY = 0.999
#: Change of history, in shares, after which a forecast counts as lasting.
SETTLED = 0.05
#: The longest horizon, in iterations.
LONGEST = 256


class ForecastHorizon:
    """The estimate for one policy's forecasts during one run.

    Args:
        deployed_LE: load shares for which the first plans were made.
    """

    def __init__(self, deployed_LE: FloatArray) -> None:
        self._settled_LE = np.array(deployed_LE, np.float64)
        self._last: dict[tuple[int, Phase], FloatArray] = {}
        # sums of deviations times those before them, and of these squared
        self._sums: dict[Phase, FloatArray] = {}

    def horizon(self, layer: int, phase: Phase, forecast: Forecast, history_E: FloatArray | None) -> int:
        """``PlanInput.horizon_iterations`` of a plan made from this forecast; 0 for no limit.

        Args:
            history_E: the layer's past load shares; None before the first iteration.
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
        return self.iterations(phase)

    def iterations(self, phase: Phase) -> int:
        """Iterations for which a phase's forecasts stay useful, by the estimate so far; 1 before there is one."""
        together, power = self._sums.get(phase, np.zeros(2))
        fades = min(max(together / power, 0.0), 1.0 - 1.0 / LONGEST) if power > 0.0 else 0.0
        return round(1.0 / (1.0 - fades))
