"""Spans of one iteration held as columns, so that scheduling makes no object per request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from moeless.contracts import BoolArray, Int32Array, IntArray, Iteration, Phase, Span


class Spans(Sequence[Span]):
    """The spans of one iteration: prefill spans first, then decode spans of one position each.

    A sequence of :class:`Span`, made on access; the columns are the fast way in.
    """

    __slots__ = ("_decode_requests", "_decode_starts", "_emits", "_prefill", "tokens")

    def __init__(
        self,
        prefill: Sequence[tuple[int, int, int, bool]],
        decode_requests: Sequence[int],
        decode_starts: Sequence[int],
    ) -> None:
        """Args: prefill (request, start, stop, ends its prompt); requests and positions of decode steps."""
        self._prefill = prefill
        self._decode_requests = decode_requests
        self._decode_starts = decode_starts
        self.tokens = len(decode_requests)
        for _, start, stop, _ in prefill:
            self.tokens += stop - start

    def __len__(self) -> int:
        return len(self._prefill) + len(self._decode_requests)

    @overload
    def __getitem__(self, index: int) -> Span: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Span]: ...
    def __getitem__(self, index: int | slice) -> Span | Sequence[Span]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index < len(self._prefill):
            request, start, stop, _ = self._prefill[index]
            return Span(request, start, stop, Phase.PREFILL)
        index -= len(self._prefill)
        start = self._decode_starts[index]
        return Span(self._decode_requests[index], start, start + 1, Phase.DECODE)

    def __iter__(self) -> Iterator[Span]:
        for request, start, stop, _ in self._prefill:
            yield Span(request, start, stop, Phase.PREFILL)
        for request, start in zip(self._decode_requests, self._decode_starts, strict=True):
            yield Span(request, start, start + 1, Phase.DECODE)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Spans({list(self)!r})"

    @property
    def num_prefill(self) -> int:
        """Spans that are prefill; they come first."""
        return len(self._prefill)

    @property
    def prefill_tokens(self) -> int:
        """Tokens of the prefill spans."""
        return self.tokens - len(self._decode_requests)

    @property
    def phase(self) -> Phase:
        """PREFILL or DECODE where all spans agree, otherwise MIXED."""
        if not self._decode_requests:
            return Phase.PREFILL
        return Phase.MIXED if self._prefill else Phase.DECODE

    @property
    def request_N(self) -> IntArray:
        """Request of each span, ``[N]``."""
        return np.array([span[0] for span in self._prefill] + list(self._decode_requests), np.int64)

    def columns(self) -> tuple[IntArray, IntArray, IntArray, BoolArray]:
        """As :func:`span_columns`."""
        request_N, count = self.request_N, len(self._prefill)
        start_N = np.array([span[1] for span in self._prefill] + list(self._decode_starts), np.int64)
        stop_N, prefill_N = start_N + 1, np.zeros(len(start_N), np.bool_)
        if count:
            stop_N[:count], prefill_N[:count] = [span[2] for span in self._prefill], True
        return request_N, start_N, stop_N, prefill_N

    @property
    def emitting(self) -> list[int]:
        """Requests that get an output token from this iteration: prompts that end, then every decode step."""
        return [span[0] for span in self._prefill if span[3]] + list(self._decode_requests)


def span_columns(spans: Sequence[Span]) -> tuple[IntArray, IntArray, IntArray, BoolArray]:
    """Request, first position, position after the last, and whether it is prefill, of each span, ``[N]``."""
    if isinstance(spans, Spans):
        return spans.columns()
    rows = [(span.request, span.start, span.stop, span.phase == Phase.PREFILL) for span in spans]
    request_N, start_N, stop_N, prefill_N = np.array(rows, np.int64).reshape(-1, 4).T
    return request_N, start_N, stop_N, prefill_N.astype(np.bool_)


@dataclass(frozen=True)
class ScheduledIteration(Iteration):
    """An iteration whose spans are columns; what the schedulers here return."""

    spans: Spans

    @property
    def tokens(self) -> int:
        """Tokens of this pass."""
        return self.spans.tokens

    @property
    def phase(self) -> Phase:
        """PREFILL or DECODE where all spans agree, otherwise MIXED."""
        return self.spans.phase

    @property
    def rank_N(self) -> Int32Array:
        """Owner rank of each span, ``[N]``."""
        rank = self.rank_of_request
        return np.array([rank[request] for request in self.spans.request_N.tolist()], np.int32)
