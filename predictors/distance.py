"""Which distance to forecast each layer from: as near as the time to prepare a replica allows.

A forecast made nearer its target is better and later. One made d layers ahead has those layers' time for itself, for
planning and for bringing weights; where that is not enough it does nothing for this iteration. So, for each target
layer: of the distances whose layers take at least as long as a replica takes to prepare, the one with the most skill on
validation (usually the nearest); where none is in time, or all have less skill than what is known before the iteration
(history, the iteration before), the plan is made as the iteration starts. Layer times are those that the run itself
shows, by phase, so that the choice follows the load.

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
    """The rule of one policy.

    Args:
        predictor: asked for its skill (:meth:`LoadPredictor.skill`).
        prepare_seconds: from a layer's start until a replica planned from it can serve: forecast, plan, copy.
        longest: the largest distance to consider.
    """

    def __init__(self, predictor: LoadPredictor, prepare_seconds: float, longest: int) -> None:
        self.predictor, self.prepare_seconds = predictor, prepare_seconds
        self.layers, self.longest = predictor.spec.L, min(longest, predictor.spec.L - 1)
        self._seconds: dict[Phase, FloatArray] = {}

    def note(self, layer: int, phase: Phase, seconds: float) -> None:
        """What a layer of that phase took, from its start to the next one's."""
        if phase not in self._seconds:
            # the first one stands for all until they have run
            self._seconds[phase] = np.full(self.layers, seconds)
        known_L = self._seconds[phase]
        known_L[layer] += NEWEST * (seconds - known_L[layer])

    def choose(self, phase: Phase, tokens: int) -> IntArray:
        """Distance of each target layer, ``[L]``; ``target + 1`` means before the iteration starts."""
        seconds_L = self._seconds.get(phase)
        chosen_L = np.arange(1, self.layers + 1)
        if seconds_L is None:
            # nothing has run yet: the farthest is the safest
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
