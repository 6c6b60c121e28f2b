"""The past loads that a predictor or planner may know while requests are served.

Axes: L MoE layers, E experts, I iterations, W iterations of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import Context, FloatArray, IntArray, Phase
from moeless.jit import njit

#: Weight that past iterations keep per iteration: half is forgotten in about 700.
DECAY = 0.999
#: Iterations of the windowed sum.
WINDOW = 64


class LoadHistory:
    """Exponentially forgotten loads of every layer, those of the last iterations, and the last one's by phase.

    A simulation adds whole iterations, a live run layer by layer; one history is used in one of the two ways.

    Args:
        prior_share_LE: load shares known beforehand (rows sum to 1), None at a cold start.
        top_k: experts per token.
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
        self._last: dict[Phase, Any] = {}
        self._seen_L, self._tokens_L = np.zeros((2, num_layers), np.int64)
        # a ring of the last loads, and their sum, which is asked for in every layer
        self._window_WLE = np.zeros((WINDOW, num_layers, num_experts), np.int64)
        self._recent_LE = np.zeros((num_layers, num_experts), np.int64)

    def add(self, load_LE: IntArray, phase: Phase, tokens: int) -> None:
        """Note an iteration's true loads, once it has run."""
        slot = int(self._seen_L[0]) % WINDOW
        _add_loads(np.ascontiguousarray(load_LE, np.int64), self._window_WLE[slot], self.weight_LE, self._recent_LE)
        # a copy: callers may use theirs again
        self._last[phase] = load_LE.copy()
        self.count(1, tokens)

    def add_steps(self, load_ILE: NDArray[np.integer[Any]], phase: Phase, tokens: int) -> None:
        """Note iterations of so many tokens each whose loads ``weight_LE`` holds already."""
        steps = len(load_ILE)
        kept_ILE = load_ILE[-WINDOW:]
        slots = (self._seen_L[0] + np.arange(steps - len(kept_ILE), steps)) % WINDOW
        self._recent_LE -= self._window_WLE[slots].sum(0)
        self._window_WLE[slots] = kept_ILE
        self._recent_LE += self._window_WLE[slots].sum(0)
        # a copy: compiled loops use their rows again
        self._last[phase] = load_ILE[-1].copy()
        self.count(steps, steps * tokens)

    def count(self, iterations: int, tokens: int) -> None:
        """Note iterations whose loads nobody will ask for."""
        self._seen_L += iterations
        self._tokens_L += tokens

    def add_layer(self, layer: int, load_E: IntArray, phase: Phase, tokens: int) -> None:
        """Note one layer's true load in an iteration of so many tokens."""
        self.weight_LE[layer] = DECAY * self.weight_LE[layer] + load_E
        slot_E = self._window_WLE[self._seen_L[layer] % WINDOW, layer]
        self._recent_LE[layer] += load_E - slot_E
        slot_E[:] = load_E
        self._last.setdefault(phase, [None] * len(self.weight_LE))[layer] = load_E
        self._seen_L[layer] += 1
        self._tokens_L[layer] += tokens

    def share(self, layer: int) -> FloatArray | None:
        """Mean load share of a layer, ``[E]``; None before anything is known."""
        weight_E = self.weight_LE[layer]
        total = float(weight_E.sum())
        return np.asarray(weight_E / total) if total > 0 else None

    def shares_or_even(self) -> FloatArray:
        """Mean load shares, ``[L, E]``; even ones of layers of which nothing is known."""
        layers, experts = self.weight_LE.shape
        even_E = np.full(experts, 1.0 / experts)
        found: Sequence[FloatArray | None] = [self.share(layer) for layer in range(layers)]
        return np.stack([even_E if share_E is None else share_E for share_E in found])

    def recent(self, layer: int) -> IntArray | None:
        """Load of a layer summed over its last ``WINDOW`` iterations, ``[E]``; None before it has run."""
        return self._recent_LE[layer].copy() if self._seen_L[layer] else None

    def last(self, layer: int, phase: Phase) -> IntArray | None:
        """The layer's load in the previous iteration of this phase, ``[E]``."""
        load_LE = self._last.get(phase)
        return None if load_LE is None or load_LE[layer] is None else np.asarray(load_LE[layer])

    def context(self, target: int, tokens: int, phase: Phase, **read: Any) -> Context:
        """What a predictor may know of a target layer; ``read`` is what it sees of the iteration itself."""
        inputs: dict[str, Any] = {"router_input_TH": None, "topk_TK": None} | read
        return Context(
            history_E=self.share(target),
            last_load_E=self.last(target, phase),
            tokens=tokens,
            phase=phase,
            recent_E=self.recent(target),
            **inputs,
        )

    @property
    def mean_tokens(self) -> float | None:
        """Mean tokens of the iterations that have run."""
        return float(self._tokens_L[0] / self._seen_L[0]) if self._seen_L[0] else None


@njit(cache=True, nogil=True, allocates=False)
def _add_loads(load_LE, slot_LE, weight_LE, recent_LE):  # type: ignore[no-untyped-def]
    """Take an iteration's loads into the decayed sum and, in the place of the oldest, into the window's."""
    layers, experts = load_LE.shape
    for layer in range(layers):
        for e in range(experts):
            load = load_LE[layer, e]
            weight_LE[layer, e] = weight_LE[layer, e] * DECAY + load
            recent_LE[layer, e] += load - slot_LE[layer, e]
            slot_LE[layer, e] = load
