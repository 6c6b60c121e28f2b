"""Means and percentiles of measured times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Fewer samples than this make a 99th percentile one observation.
MIN_SAMPLES_P99 = 100
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Summary:
    """Mean, median, standard deviation (population), 90th and 99th percentile, in the input's unit."""

    mean: float
    median: float
    std: float
    p90: float
    p99: float
    samples: int


def summarise(values: ArrayLike, weights: ArrayLike | None = None) -> Summary | None:
    """Summarise samples by linear interpolation between order statistics; None where there are none.

    ``weights`` counts how often each value occurs (whole numbers), as when one gap holds for a whole batch;
    the result is that of the values repeated so often.
    """
    if weights is None:
        return _plain(np.asarray(values))
    values_N = np.asarray(values, np.float64)
    count_N = np.asarray(weights, np.int64)
    values_N, count_N = values_N[count_N > 0], count_N[count_N > 0]
    total = int(count_N.sum())
    if total == 0:
        return None
    order = np.argsort(values_N, kind="stable")
    sorted_N, upto_N = values_N[order], np.cumsum(count_N[order])
    mean = float(np.dot(values_N, count_N) / total)
    variance = float(np.dot((values_N - mean) ** 2, count_N) / total)

    def percentile(q: float) -> float:
        rank = q / 100.0 * (total - 1)
        low = int(rank)
        at = sorted_N[np.searchsorted(upto_N, [low, min(low + 1, total - 1)], side="right")]
        return float(at[0] + (at[1] - at[0]) * (rank - low))

    return Summary(mean, percentile(50), float(np.sqrt(variance)), percentile(90), percentile(99), total)


def _plain(values_N: NDArray[Any]) -> Summary | None:
    """The same without weights, in one copy of the array: millions of layer times pass here."""
    if not len(values_N):
        return None
    mean, squares = float(values_N.mean(dtype=np.float64)), 0.0
    for start in range(0, len(values_N), _CHUNK):
        squares += float(np.square(values_N[start : start + _CHUNK].astype(np.float64) - mean).sum())
    median, p90, p99 = (float(v) for v in np.percentile(values_N, [50, 90, 99]))
    return Summary(mean, median, float(np.sqrt(squares / len(values_N))), p90, p99, len(values_N))


def cdf(values: ArrayLike) -> tuple[float, ...]:
    """The 0th, 1st, ... 100th percentile; empty where there are no values."""
    values_N = np.asarray(values)
    if not len(values_N):
        return ()
    return tuple(float(v) for v in np.percentile(values_N, np.arange(101)))
