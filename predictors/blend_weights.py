"""How much of a forecast comes from the tokens, from history and from the last iteration.

The three are load shares, and a mixture of them is one again, so the weights lie on the simplex. They are chosen where
the mean relative L1 error over held-out iterations is least, among all weights in steps of one twentieth: an exact
search of 231 mixtures, which no local minimum misleads. Small iterations are mostly chance, large ones mostly text, so
weights are chosen per size and interpolated over the logarithm of the tokens.

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
#: Iterations on tokens of their own that a choice needs at least.
FEWEST = 2
#: One-sided normal quantile: a mixture is kept where its gain over history is above nought with 95 % confidence.
CONFIDENCE = 1.6448536269514722
#: Times that two equally good forecasts differ by: ties go to the mixture with less of what must be computed.
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
    """Weights of one size, and what they cost on the iterations that chose them.

    Attributes:
        error: mean relative L1 of the mixture; ``history_error``: of history alone.
    """

    weight_S: FloatArray
    error: float
    history_error: float


def relative_error(share_IE: FloatArray, true_IE: FloatArray) -> FloatArray:
    """Relative L1 of load shares, ``[I]``."""
    return np.asarray(np.abs(share_IE - true_IE).sum(1))


def choose(share_SIE: FloatArray, true_IE: FloatArray, independent: float, steps: int = 20) -> Choice:
    """The best weights, or history alone where they do not surely beat it.

    Args:
        share_SIE: shares that each source forecasts, in the order of ``SOURCES``.
        true_IE: true shares.
        independent: how many of the iterations stand on tokens of their own; fewer than two prove nothing.
    """
    candidates = simplex(steps)
    error_CI = np.stack([relative_error(np.tensordot(weight_S, share_SIE, 1), true_IE) for weight_S in candidates])
    error_C = error_CI.mean(1)
    history = 0
    best = int(np.flatnonzero(error_C <= error_C.min() + TIE)[0])
    gain_I = error_CI[history] - error_CI[best]
    doubt = CONFIDENCE * float(gain_I.std()) / max(1.0, independent) ** 0.5
    if independent < FEWEST or float(gain_I.mean()) <= doubt:
        best = history
    return Choice(candidates[best].copy(), float(error_C[best]), float(error_C[history]))


def borrow(weight_S: FloatArray, share_SIE: FloatArray, true_IE: FloatArray) -> Choice:
    """Weights of a smaller size where iterations of this one are too few to prove anything, unless they speak against.

    Chance shrinks with the tokens while history's distance from the text stays, so what surely wins in small iterations
    is no less to be expected in large ones. Axes as in :func:`choose`.
    """
    history_S = simplex(1)[0]
    error, history = (
        float(relative_error(np.tensordot(mixed_S, share_SIE, 1), true_IE).mean()) for mixed_S in (weight_S, history_S)
    )
    return Choice(weight_S.copy(), error, history) if error < history else Choice(history_S.copy(), history, history)


def at_size(size_N: Sequence[int], value_NX: NDArray[np.floating], tokens: int) -> FloatArray:
    """Values between two sizes, linear in the logarithm of the tokens; the nearest size's beyond the ends."""
    if len(size_N) == 1:
        return np.asarray(value_NX[0], np.float64)
    position = np.interp(np.log(max(1, tokens)), np.log(size_N), np.arange(len(size_N)))
    low = min(int(position), len(size_N) - 2)
    part = float(position) - low
    return np.asarray((1 - part) * value_NX[low] + part * value_NX[low + 1], np.float64)
