"""Making a measured grid monotone, and what interpolating it costs.

Axes: A numbers of active experts, N tokens per expert.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def nonnegative_least_squares(matrix: FloatArray, target: FloatArray, tolerance: float = 1e-10) -> FloatArray:
    """``x >= 0`` with the least ``|matrix x - target|``, by the active-set method of Lawson and Hanson (1974)."""
    columns = matrix.shape[1]
    # columns of one length keep the normal equations well conditioned
    length = np.linalg.norm(matrix, axis=0)
    scaled = matrix / length
    gram, moment = scaled.T @ scaled, scaled.T @ target
    x = np.zeros(columns)
    free = np.zeros(columns, np.bool_)
    for _ in range(6 * columns):
        gradient = moment - gram @ x
        gradient[free] = -np.inf
        enter = int(np.argmax(gradient))
        if gradient[enter] <= tolerance * np.abs(moment).max():
            break
        free[enter] = True
        while True:
            at = np.flatnonzero(free)
            trial = np.zeros(columns)
            trial[at] = np.linalg.solve(gram[np.ix_(at, at)], moment[at])
            if trial[at].min() > 0:
                x = trial
                break
            low = at[trial[at] <= 0]
            step = float((x[low] / np.maximum(x[low] - trial[low], 1e-300)).min())
            x += step * (trial - x)
            free &= x > 1e-14 * max(x.max(), 1e-300)
            x[~free] = 0.0
            if not free.any():
                break
    return np.asarray(x / length)


def monotone_grid(seconds_AN: FloatArray) -> FloatArray:
    """The nearest grid, in relative error, that rises along both axes with mixed differences that are not negative.

    Such a grid is a sum of steps, one from each cell to the upper right, each at least 0; the steps are found by
    non-negative least squares weighted by 1 / seconds.
    """
    actives, tokens = seconds_AN.shape
    up_A, up_N = np.tril(np.ones((actives, actives))), np.tril(np.ones((tokens, tokens)))
    matrix = np.kron(up_A, up_N) / seconds_AN.reshape(-1, 1)
    steps_AN = nonnegative_least_squares(matrix, np.ones(seconds_AN.size)).reshape(actives, tokens)
    return up_A @ steps_AN @ up_N.T


def monotone_curve(seconds_N: FloatArray) -> FloatArray:
    """The nearest non-decreasing curve in relative error, by pooling adjacent violators."""
    blocks: list[list[float]] = []
    for value in np.asarray(seconds_N, np.float64).tolist():
        # relative error |x - v| / v: weights 1 / v^2
        blocks.append([value, 1.0 / value**2, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            value, weight, count = blocks.pop()
            before = blocks[-1]
            total = before[1] + weight
            blocks[-1] = [(before[0] * before[1] + value * weight) / total, total, before[2] + count]
    return np.concatenate([np.full(int(count), value) for value, _, count in blocks])


def leave_one_out(
    x_N: FloatArray, active_A: FloatArray, seconds_AN: FloatArray, measured_AN: FloatArray
) -> dict[str, float]:
    """Relative error of predicting each inner point's raw measurement from its two neighbours in the grid in use.

    It is an upper guide to the interpolation's error: the neighbours are twice as far apart as in use, and the
    measurement's own noise counts.
    """

    def errors(x: FloatArray, values: FloatArray, truth: FloatArray) -> FloatArray:
        if len(x) < 3:
            return np.zeros(0)
        weight = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
        guess = values[..., :-2] + weight * (values[..., 2:] - values[..., :-2])
        return np.abs(guess / truth[..., 1:-1] - 1.0).reshape(-1)

    found = {
        "tokens": errors(x_N, seconds_AN, measured_AN),
        "active": errors(active_A, seconds_AN.T, measured_AN.T),
    }
    report = {}
    for axis, error in found.items():
        if len(error):
            report[f"{axis}_median"] = float(np.median(error))
            report[f"{axis}_p90"] = float(np.quantile(error, 0.9))
            report[f"{axis}_max"] = float(error.max())
    return report
