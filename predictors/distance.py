"""The distance at which each layer is forecast: the best one that leaves time to prepare a replica.

The nearer a forecast is made to its target, the better it is, and the less time is left to plan and to load weights. A
plan that comes too late does nothing for the iteration. So each target layer gets, of the distances whose layers take
at least as long as preparing a replica, the one with the most skill on validation requests (usually the nearest). If
none is in time, or none has more skill than the forecast before the iteration (history, the iteration before), the
layer is planned when the iteration starts. Layer times are means of the running iterations, by phase.

Axes: L target layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moeless.contracts import FloatArray, IntArray, Phase

if TYPE_CHECKING:
    from moeless.predictors.base import LoadPredictor

#: The largest distance that ``auto`` considers.
LONGEST = 8
#: Weight of the newest layer time in the running mean.
NEWEST = 0.2


class DistanceRule:
    """Chooses the distances of one policy.

    Args:
        predictor: the policy's predictor, whose :meth:`LoadPredictor.skill` is compared.
        prepare_seconds: seconds for forecast, plan and copy of a replica.
        longest: the largest distance to consider.
    """

    def __init__(self, predictor: LoadPredictor, prepare_seconds: float, longest: int) -> None:
        self.predictor, self.prepare_seconds = predictor, prepare_seconds
        self.layers, self.longest = predictor.spec.L, min(longest, predictor.spec.L - 1)
        self._seconds: dict[Phase, FloatArray] = {}

    def note(self, layer: int, phase: Phase, seconds: float) -> None:
        """Record the seconds from a layer's start to that of the next."""
        if phase not in self._seconds:
            # the first time known stands for all layers until they have run
            self._seconds[phase] = np.full(self.layers, seconds)
        known_L = self._seconds[phase]
        known_L[layer] += NEWEST * (seconds - known_L[layer])

    def choose(self, phase: Phase, tokens: int) -> IntArray:
        """Distance ``[L]`` of each target layer; ``target + 1`` for a plan made before the iteration starts."""
        seconds_L = self._seconds.get(phase)
        chosen_L = np.arange(1, self.layers + 1)
        if seconds_L is None:
            # nothing has run yet: the farthest leaves the most time
            return np.asarray(np.minimum(chosen_L, max(1, self.longest)))
        for target in range(self.layers):
            best = self.predictor.skill(-1, target + 1, phase, tokens) or 0.0
            lead = 0.0
            for distance in range(1, min(self.longest, target) + 1):
                lead += float(seconds_L[target - distance])
                skill = self.predictor.skill(target - distance, distance, phase, tokens)
                if skill is not None and lead >= self.prepare_seconds and skill > best:
                    chosen_L[target], best = distance, skill
        return chosen_L
