"""The past loads that a predictor or planner may know while a simulation runs."""

from __future__ import annotations

from collections import deque

import numpy as np

from moeless.contracts import FloatArray, IntArray, Phase

#: Weight that past iterations keep per iteration: half is forgotten in about 700.
DECAY = 0.999
#: Iterations of the windowed mean, and how many of them lie between its marks.
WINDOW = 64
MARK_EVERY = 8


class LoadHistory:
    """Exponentially forgotten loads of every layer, and the last iteration's of each phase.

    Args:
        prior_share_LE: load shares known beforehand (rows sum to 1), None at a cold start.
        prior_tokens: how many tokens' worth the prior counts for.

    Attributes:
        weight_LE: the forgotten loads; compiled loops update it in place.
    """

    def __init__(
        self,
        prior_share_LE: FloatArray | None,
        num_layers: int,
        num_experts: int,
        top_k: int,
        prior_tokens: float = 1e4,
    ) -> None:
        self.weight_LE = np.zeros((num_layers, num_experts))
        if prior_share_LE is not None:
            self.weight_LE += np.asarray(prior_share_LE, np.float64) * (prior_tokens * top_k)
        self._last: dict[Phase, IntArray] = {}
        self._seen = 0
        self._tokens = 0
        # sums as they were after so many iterations: what came since is the present sum less what is left of them
        self._marks: deque[tuple[int, FloatArray]] = deque([(0, self.weight_LE.copy())])

    def add(self, load_LE: IntArray, phase: Phase, tokens: int) -> None:
        """Note an iteration's true loads, once it has run."""
        self.weight_LE *= DECAY
        self.weight_LE += load_LE
        self._last[phase] = load_LE
        self.count(1, tokens)

    def note_last(self, load_LE: IntArray, phase: Phase) -> None:
        """Note the last of several iterations whose loads ``weight_LE`` holds already."""
        self._last[phase] = load_LE

    def count(self, iterations: int, tokens: int) -> None:
        """Note iterations whose loads ``weight_LE`` holds already."""
        self._seen += iterations
        self._tokens += tokens
        if self._seen - self._marks[-1][0] >= MARK_EVERY:
            self._marks.append((self._seen, self.weight_LE.copy()))
            while len(self._marks) > 1 and self._seen - self._marks[1][0] >= WINDOW:
                self._marks.popleft()

    def share(self, layer: int) -> FloatArray | None:
        """Mean load share of a layer, ``[E]``; None before anything is known."""
        weight_E = self.weight_LE[layer]
        total = float(weight_E.sum())
        return np.asarray(weight_E / total) if total > 0 else None

    def recent(self, layer: int) -> FloatArray | None:
        """Load of a layer over about the last ``WINDOW`` iterations, ``[E]``; None before any has run."""
        seen, weight_LE = self._marks[0]
        if self._seen == seen:
            return None
        left_E = weight_LE[layer] * DECAY ** (self._seen - seen)
        return np.asarray(np.maximum(self.weight_LE[layer] - left_E, 0.0))

    def share_or_even(self, layer: int) -> FloatArray:
        """Mean load share of a layer, even shares before anything is known."""
        share_E = self.share(layer)
        experts = self.weight_LE.shape[1]
        return np.full(experts, 1.0 / experts) if share_E is None else share_E

    def last(self, layer: int, phase: Phase) -> IntArray | None:
        """The layer's load in the previous iteration of this phase, ``[E]``."""
        load_LE = self._last.get(phase)
        return None if load_LE is None else np.asarray(load_LE[layer])

    @property
    def mean_tokens(self) -> float | None:
        """Mean tokens of the iterations so far."""
        return self._tokens / self._seen if self._seen else None
