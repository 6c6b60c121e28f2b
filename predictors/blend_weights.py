"""The weights of a blend: how much of a forecast comes from the tokens, from history and from the last iteration.

The three sources are load shares, so weights that sum to 1 give load shares again. Of all weights in steps of one
twentieth (231 of them) those are chosen that have the least mean relative L1 error over held-out iterations. Loads of
small iterations depend mostly on chance and those of large ones mostly on their text, so weights are chosen for several
sizes and interpolated over the logarithm of the tokens.

Axes: C candidate weights, S sources, I iterations, E experts, N sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import FloatArray

SOURCES = ("tokens", "history", "last")
TOKENS, HISTORY, LAST = range(3)
#: Fewest iterations, counted by their different tokens, on which weights are chosen.
FEWEST = 2
#: One-sided normal quantile: weights are kept if their gain over history is above 0 with 95 % confidence.
CONFIDENCE = 1.6448536269514722
#: Errors that differ by less are equal; ties go to the weights that need less computation.
TIE = 1e-9


@lru_cache
def simplex(steps: int) -> FloatArray:
    """All weights of three sources in steps of ``1 / steps``, ``[C, S]``; history alone comes first."""
    made = [
        (tokens, steps - tokens - last, last)
        for last in range(steps + 1)
        for tokens in range(steps + 1 - last)
    ]  # fmt: skip
    return np.array(made, np.float64) / steps


@dataclass(frozen=True)
class Choice:
    """Weights for one size of iteration, and their error on the iterations that chose them.

    Attributes:
        weight_S: weights of the sources, which sum to 1.
        error: mean relative L1 error with these weights; ``history_error``: of history alone.
    """

    weight_S: FloatArray
    error: float
    history_error: float


def choose(
    share_SIE: FloatArray, true_IE: FloatArray, independent: float, smaller_S: FloatArray | None = None, steps: int = 20
) -> Choice:
    """The weights with the least error, or history alone where their gain over it is not certain.

    Where the iterations are too few to choose from, the weights of a smaller size are taken if they have a smaller
    error than history here: with more tokens there is less chance in a load, while history knows its text no better, so
    a forecast that beats history in small iterations should beat it in large ones.

    Args:
        share_SIE: load shares that each source forecasts, in the order of ``SOURCES``.
        true_IE: true load shares.
        independent: how many iterations their different tokens would fill.
        smaller_S: weights chosen for a smaller size, multiples of ``1 / steps``; None if there are none.
    """
    candidates, history = simplex(steps), 0
    error_CI = np.stack([np.abs(np.tensordot(weight_S, share_SIE, 1) - true_IE).sum(1) for weight_S in candidates])
    error_C = error_CI.mean(1)
    if independent < FEWEST:
        borrowed = history if smaller_S is None else int(np.flatnonzero((candidates == smaller_S).all(1))[0])
        best = borrowed if error_C[borrowed] < error_C[history] else history
    else:
        best = int(np.flatnonzero(error_C <= error_C.min() + TIE)[0])
        gain_I = error_CI[history] - error_CI[best]
        if float(gain_I.mean()) <= CONFIDENCE * float(gain_I.std()) / independent**0.5:
            best = history
    return Choice(candidates[best].copy(), float(error_C[best]), float(error_C[history]))


def at_size(size_N: Sequence[int], value_NX: NDArray[np.floating], tokens: int) -> FloatArray:
    """Values ``[X]`` for a size: linear between two sizes in the logarithm of the tokens, constant beyond the ends."""
    if len(size_N) == 1:
        return np.asarray(value_NX[0], np.float64)
    position = np.interp(np.log(max(1, tokens)), np.log(size_N), np.arange(len(size_N)))
    low = min(int(position), len(size_N) - 2)
    part = float(position) - low
    return np.asarray((1 - part) * value_NX[low] + part * value_NX[low + 1], np.float64)
