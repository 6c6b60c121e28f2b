"""Iterations composed of a trace's requests, for calibration and evaluation.

A *prefill* iteration of n tokens is whole consecutive requests, cut at n tokens. A *decode* iteration is one random
generated token from each of n requests drawn with replacement. A trace without prompts makes prefill iterations of its
generated tokens: the routing of a text does not depend on who wrote it.

Axes: T tokens, I iterations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless.contracts import IntArray, Phase
from moeless.predictors.trace_rows import Rows

#: Iterations in the mean of the predictor ``window``.
RECENT = 8


@dataclass(frozen=True)
class ComposedIteration:
    """One iteration, as rows of the trace.

    Attributes:
        row_T: its tokens.
        previous_T: those of the iteration before; empty for the first.
        recent_T: those of the last ``RECENT`` iterations before, together.
    """

    row_T: IntArray
    previous_T: IntArray
    phase: Phase
    recent_T: IntArray

    @property
    def tokens(self) -> int:
        """Tokens of the iteration."""
        return len(self.row_T)


def available_phases(rows: Rows) -> tuple[Phase, ...]:
    """Phases that a trace can make iterations of: prefill always, decode if it holds generated tokens."""
    decode = bool((rows.phase_T == Phase.DECODE).any())
    return (Phase.PREFILL, Phase.DECODE) if decode else (Phase.PREFILL,)


def iterations_of(
    rows: Rows, requests: IntArray, phase: Phase, tokens: int, limit: int, seed: int
) -> list[ComposedIteration]:
    """At most ``limit`` iterations of ``tokens`` tokens; prefill takes the requests in shuffled order."""
    rng = np.random.default_rng([seed, int(phase), tokens])
    if phase == Phase.DECODE:
        return decode_iterations(rows, requests, tokens, limit, rng)
    return prefill_iterations(rows, rng.permutation(requests), tokens, limit)


def prefill_iterations(
    rows: Rows, requests: IntArray, tokens: int, limit: int | None = None
) -> list[ComposedIteration]:
    """At most ``limit`` consecutive iterations of ``tokens`` tokens, over the requests in the order given.

    A shorter rest at the end is dropped, unless it is the only iteration.
    """
    row_T = rows.of(requests)
    prompt = rows.phase_T[row_T] == Phase.PREFILL
    if prompt.any():
        row_T = row_T[prompt]
    count = max(1, len(row_T) // tokens)
    parts = [row_T[start : start + tokens] for start in range(0, count * tokens, tokens)][:limit]
    none = np.empty(0, np.int64)
    return [
        ComposedIteration(
            part, parts[i - 1] if i else none, Phase.PREFILL, np.concatenate([none, *parts[max(0, i - RECENT) : i]])
        )
        for i, part in enumerate(parts)
    ]


def decode_iterations(
    rows: Rows, requests: IntArray, tokens: int, limit: int, rng: np.random.Generator
) -> list[ComposedIteration]:
    """``limit`` iterations of one generated token from each of ``tokens`` requests drawn with replacement.

    The iteration before holds the previous token of each request, as between two decode steps of the same requests. The
    list is empty if no request generated two tokens.
    """
    row_T = rows.of(requests)
    request_T = np.repeat(np.arange(len(requests)), rows.rows_N[requests])
    decode = rows.phase_T[row_T] == Phase.DECODE
    row_T, request_T = row_T[decode], request_T[decode]
    _, first, length = np.unique(request_T, return_index=True, return_counts=True)
    first, length = first[length > 1], length[length > 1]
    made: list[ComposedIteration] = []
    for _ in range(limit if len(first) else 0):
        drawn = rng.integers(0, len(first), tokens)
        at = first[drawn] + 1 + (rng.random(tokens) * (length[drawn] - 1)).astype(np.int64)
        back = at[:, None] - np.arange(1, RECENT + 1)
        recent_T = row_T[back[back >= first[drawn][:, None]]]
        made.append(ComposedIteration(row_T[at], row_T[at - 1], Phase.DECODE, recent_T))
    return made
