"""Loads that every rank has seen, equal on all of them: what history predictors and planners may know."""

from __future__ import annotations

from collections import deque

import numpy as np

from moeless.contracts import FloatArray, IntArray, Phase

#: Weight that past iterations keep per iteration: half is forgotten in about 700.
DECAY = 0.999
#: Iterations of the windowed mean.
WINDOW = 64


class LiveHistory:
    """Forgetting sums of the gathered loads, and the last iteration's of each phase, by layer."""

    def __init__(self, layers: int, experts: int) -> None:
        self._weight_LE = np.zeros((layers, experts))
        self._last: dict[tuple[int, Phase], IntArray] = {}
        self._recent_L: list[deque[IntArray]] = [deque() for _ in range(layers)]
        # kept as a running sum, for it is asked for in every layer
        self._recent_LE = np.zeros((layers, experts), np.int64)
        self._seen_L = np.zeros(layers)
        self._tokens_L = np.zeros(layers)

    def add(self, layer: int, load_E: IntArray, phase: Phase, tokens: int) -> None:
        """Note one layer's true load."""
        self._weight_LE[layer] = DECAY * self._weight_LE[layer] + load_E
        self._last[layer, phase] = load_E
        kept = self._recent_L[layer]
        kept.append(load_E)
        self._recent_LE[layer] += load_E
        if len(kept) > WINDOW:
            self._recent_LE[layer] -= kept.popleft()
        self._seen_L[layer] += 1
        self._tokens_L[layer] += tokens

    def share(self, layer: int) -> FloatArray | None:
        """Mean load share, ``[E]``; None before anything was seen."""
        total = float(self._weight_LE[layer].sum())
        return self._weight_LE[layer] / total if total > 0 else None

    def recent(self, layer: int) -> IntArray | None:
        """Load summed over the last ``WINDOW`` iterations, ``[E]``; None before anything was seen."""
        return self._recent_LE[layer].copy() if self._recent_L[layer] else None

    def last(self, layer: int, phase: Phase) -> IntArray | None:
        """Load in the previous iteration of this phase."""
        return self._last.get((layer, phase))

    def mean_tokens(self, layer: int) -> float | None:
        """Mean tokens of an iteration so far."""
        return float(self._tokens_L[layer] / self._seen_L[layer]) if self._seen_L[layer] else None
