"""The past loads that a predictor or planner may know while a simulation runs."""

from __future__ import annotations

import numpy as np

from moeless.contracts import FloatArray, IntArray, Phase

#: Weight that past iterations keep per iteration: half is forgotten in about 700.
DECAY = 0.999


class LoadHistory:
    """Exponentially forgotten loads of every layer, and the last iteration's of each phase.

    Args:
        prior_share_LE: load shares known beforehand (rows sum to 1), None at a cold start.
        prior_tokens: how many tokens' worth the prior counts for.
    """

    def __init__(self, prior_share_LE: FloatArray | None, top_k: int, prior_tokens: float = 1e4) -> None:
        self._weight_LE: FloatArray | None = None
        if prior_share_LE is not None:
            self._weight_LE = np.array(prior_share_LE, np.float64) * (prior_tokens * top_k)
        self._last: dict[Phase, IntArray] = {}
        self._seen = 0
        self._tokens = 0

    def add(self, load_LE: IntArray, phase: Phase, tokens: int) -> None:
        """Note an iteration's true loads, once it has run."""
        if self._weight_LE is None:
            self._weight_LE = np.zeros(load_LE.shape)
        self._weight_LE *= DECAY
        self._weight_LE += load_LE
        self._last[phase] = load_LE
        self._seen += 1
        self._tokens += tokens

    def share(self, layer: int) -> FloatArray | None:
        """Mean load share of a layer, ``[E]``; None before anything is known."""
        if self._weight_LE is None:
            return None
        weight_E = self._weight_LE[layer]
        total = float(weight_E.sum())
        return weight_E / total if total > 0 else None

    def last(self, layer: int, phase: Phase) -> IntArray | None:
        """The layer's load in the previous iteration of this phase, ``[E]``."""
        load_LE = self._last.get(phase)
        return None if load_LE is None else np.asarray(load_LE[layer])

    @property
    def mean_tokens(self) -> float | None:
        """Mean tokens of the iterations so far."""
        return self._tokens / self._seen if self._seen else None
