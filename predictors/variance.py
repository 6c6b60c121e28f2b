"""How sure a forecast of a load is: a variance that grows with the load, calibrated on held-out iterations.

Var[w] = scale * mean + spread * mean**2: the first term is the tokens' own randomness, the second what they have in
common (one text, one topic), which does not average out in large batches.

Axes: N samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import FloatArray
from moeless.predictors.metrics import NORMAL_90

#: A variance of nothing would make planners too sure where nothing was seen.
FLOOR = 0.25


@dataclass(frozen=True)
class Variance:
    """Coefficients of the variance; the default is that of a Poisson count.

    Attributes:
        skill: 1 − error / history's error in relative L1 on the iterations that calibrated it, None where none did.
    """

    scale: float = 1.0
    spread: float = 0.0
    skill: float | None = None

    def of(self, mean_E: FloatArray) -> FloatArray:
        """Variance of each load, tokens squared."""
        return np.asarray(np.maximum(self.scale * mean_E + self.spread * mean_E**2, FLOOR))


def fit_variance(mean_N: NDArray[Any], load_N: NDArray[Any]) -> Variance:
    """Calibrate on forecasts and true loads of many sizes, by non-negative weighted least squares.

    Squared errors have a spread in proportion to their mean, so each is weighted by 1 / (mean + 1).
    """
    from scipy.optimize import nnls

    mean, load = np.asarray(mean_N, np.float64).ravel(), np.asarray(load_N, np.float64).ravel()
    weight = 1.0 / (mean + 1.0)
    design = np.stack([mean, mean**2], 1) * weight[:, None]
    (scale, spread), _ = nnls(design, (load - mean) ** 2 * weight)
    return Variance(float(scale), float(spread))


def widen(
    variance: Variance, mean_N: NDArray[Any], load_N: NDArray[Any], independent: float = float("inf")
) -> Variance:
    """Scale a variance so that its normal 90 % interval holds 90 % of the loads of other iterations like those given.

    Loads have longer tails than a normal distribution, so that the variance itself covers too many or too few. The
    mixture was chosen on the same iterations: of n independent ones, a new one's error has 1 + 1/n times the variance,
    as that of a fitted mean has.

    Args:
        independent: n; infinity leaves what is seen.
    """
    mean, load = np.asarray(mean_N, np.float64).ravel(), np.asarray(load_N, np.float64).ravel()
    # an interval reaches half a token further on both sides, since loads are whole numbers
    reach = np.maximum(np.abs(load - mean) - 0.5, 0.0) / np.sqrt(variance.of(mean))
    factor = (float(np.quantile(reach, 0.9)) / NORMAL_90) ** 2 * (1.0 + 1.0 / max(1.0, independent))
    return Variance(variance.scale * factor, variance.spread * factor)
