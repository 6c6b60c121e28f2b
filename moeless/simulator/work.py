"""One iteration as its layers see it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from moeless.contracts import IntArray, Phase
from moeless.simulator.routing import Replay, SpanColumns


@dataclass
class Work:
    """The tokens of one iteration; the optional arrays are filled where the predictor reads them.

    Attributes:
        topk_TLK, router_input_TLH, token_T: experts, gate inputs and ids of the tokens, in order of the spans.
    """

    replay: Replay
    spans: SpanColumns
    phase: Phase
    tokens: int
    topk_TLK: NDArray[Any] | None = None
    router_input_TLH: NDArray[Any] | None = None
    token_T: NDArray[Any] | None = None

    @cached_property
    def load_LSE(self) -> IntArray:
        """Tokens by layer, source rank and expert."""
        return self.replay.loads(self.spans)

    @cached_property
    def load_LE(self) -> IntArray:
        """Tokens by layer and expert; compiled loops, which count them by the way, assign them."""
        return self.load_LSE.sum(1)

    @cached_property
    def sorted_T(self) -> tuple[IntArray, IntArray]:
        """The tokens' rows in the replay and their source ranks, in order of these."""
        return self.replay.sorted_tokens(self.spans)
