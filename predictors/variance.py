"""The variance of a forecast load, calibrated on held-out iterations.

Var[w] = scale * mean + spread * mean**2. The first term is the randomness of single tokens; the second is what tokens
have in common (one text, one topic), which does not average out in large iterations.

Axes: N samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import FloatArray
from moeless.predictors.metrics import NORMAL_90

#: Least variance, tokens squared: a load of which nothing was seen is not certain.
FLOOR = 0.25


@dataclass(frozen=True)
class Variance:
    """Coefficients of the variance; the default is that of a Poisson count.

    Attributes:
        scale: of the mean, tokens; ``spread``: of its square.
        skill: 1 − error / error of history, in relative L1 on the calibration iterations; None without calibration.
    """

    scale: float = 1.0
    spread: float = 0.0
    skill: float | None = None

    def of(self, mean_E: FloatArray) -> FloatArray:
        """Variance ``[E]`` of loads with these means, tokens squared."""
        return np.asarray(np.maximum(self.scale * mean_E + self.spread * mean_E**2, FLOOR))


def fit_variance(mean_N: NDArray[Any], load_N: NDArray[Any]) -> Variance:
    """Fit the coefficients to forecast and true loads, by non-negative least squares on squared errors.

    The spread of squared errors grows with the mean, so each is weighted by 1 / (mean + 1).
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
    """Scale a variance so that its normal 90 % interval holds 90 % of the loads of new iterations like those given.

    A fitted variance alone does not, because loads have longer tails than a normal distribution. The factor 1 + 1/n is
    that of a mean fitted to n samples: the forecast was fitted on the same iterations.

    Args:
        independent: n, the number of iterations; infinity for no such factor.
    """
    mean, load = np.asarray(mean_N, np.float64).ravel(), np.asarray(load_N, np.float64).ravel()
    # loads are whole numbers, so the interval is wider by half a token on both sides
    reach = np.maximum(np.abs(load - mean) - 0.5, 0.0) / np.sqrt(variance.of(mean))
    factor = (float(np.quantile(reach, 0.9)) / NORMAL_90) ** 2 * (1.0 + 1.0 / max(1.0, independent))
    return Variance(variance.scale * factor, variance.spread * factor)
