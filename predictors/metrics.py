"""How close forecasts of loads are to true ones.

Axes: I iterations, E experts, G GPUs.
"""

from __future__ import annotations

import numpy as np

from moeless.contracts import FloatArray, IntArray

#: Half-width, in standard deviations, of a normal 90 % interval.
NORMAL_90 = 1.6448536269514722


def relative_l1(mean_IE: FloatArray, load_IE: IntArray) -> FloatArray:
    """Sum of absolute errors over the total load, ``[I]``, between 0 (exact) and 2."""
    total = np.maximum(load_IE.sum(1), 1)
    return np.asarray(np.abs(mean_IE - load_IE).sum(1) / total)


def pearson(mean_IE: FloatArray, load_IE: IntArray) -> FloatArray:
    """Correlation over experts, ``[I]``; 0 where either side is constant."""
    a = mean_IE - mean_IE.mean(1, keepdims=True)
    b = load_IE - load_IE.mean(1, keepdims=True)
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.asarray(np.divide((a * b).sum(1), scale, out=np.zeros(len(a)), where=scale > 1e-12))


def hottest_hit(mean_IE: FloatArray, load_IE: IntArray) -> FloatArray:
    """Whether the expert forecast to be hottest is one of the truly hottest, ``[I]`` of 0 and 1."""
    forecast = mean_IE.argmax(1)
    truth = load_IE.max(1)
    return np.asarray(load_IE[np.arange(len(load_IE)), forecast] == truth, np.float64)


def straggler_hit(mean_IE: FloatArray, load_IE: IntArray, num_gpus: int) -> FloatArray:
    """As :func:`hottest_hit`, for GPUs that hold contiguous groups of experts (static expert parallelism), ``[I]``."""
    gpu_E = np.arange(mean_IE.shape[1]) * num_gpus // mean_IE.shape[1]
    fold = (gpu_E[:, None] == np.arange(num_gpus)).astype(np.float64)
    return hottest_hit(mean_IE @ fold, np.rint(load_IE @ fold).astype(np.int64))


def coverage(mean_IE: FloatArray, var_IE: FloatArray, load_IE: IntArray) -> FloatArray:
    """Share of experts whose load lies in the forecast's normal 90 % interval, ``[I]``; 0.9 is calibrated.

    Loads are whole numbers, so the interval is wider by half a token on both sides.
    """
    reach = NORMAL_90 * np.sqrt(var_IE) + 0.5
    return np.asarray((np.abs(load_IE - mean_IE) <= reach).mean(1))
