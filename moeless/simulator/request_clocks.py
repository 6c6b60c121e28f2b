"""When each request got its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeless.contracts import BoolArray, FloatArray, IntArray, Request
from moeless.metrics.requests import RequestTimes
from moeless.simulator.routing import SpanColumns


class RequestClocks:
    """Token times of a workload's requests, in seconds since its start.

    The first output token comes out of the prefill's last position, each decode step gives one more.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        size = max((request.id for request in requests), default=-1) + 1
        self._arrival, self._first, self._last = np.full((3, size), np.nan)
        self._prompt, self._output, self._got = np.zeros((3, size), np.int64)
        self._position = np.zeros(size, np.int64)
        for request in requests:
            self._arrival[request.id] = request.arrival
            self._prompt[request.id] = request.prompt_tokens
            self._output[request.id] = request.output_tokens
        self._gaps: list[float] = []
        self._counts: list[int] = []

    def complete(self, spans: SpanColumns, now: float) -> None:
        """Give every request whose span ends at or after its prompt's last position a token at ``now``."""
        self._position[spans.request_N] = spans.stop_N
        emits = spans.stop_N >= self._prompt[spans.request_N]
        request = spans.request_N[emits]
        again = request[self._got[request] > 0]
        if len(again):
            last = self._last[again]
            if (last == last[0]).all():
                self._gaps.append(now - float(last[0]))
                self._counts.append(len(again))
            else:
                self._gaps.extend((now - last).tolist())
                self._counts.extend([1] * len(again))
        begun = request[self._got[request] == 0]
        self._first[begun] = now
        self._last[request] = now
        self._got[request] += 1

    def repeat(self, spans: SpanColumns, end_I: FloatArray) -> None:
        """Give every request of a decode batch a token at each of the times."""
        self.complete(spans, float(end_I[0]))
        if len(end_I) > 1:
            self._gaps.extend(np.diff(end_I).tolist())
            self._counts.extend([len(spans.request_N)] * (len(end_I) - 1))
            self._last[spans.request_N] = end_I[-1]
            self._got[spans.request_N] += len(end_I) - 1
            self._position[spans.request_N] += len(end_I) - 1

    def cached(self) -> tuple[IntArray, IntArray]:
        """Unfinished requests that have begun, and the positions each has in its KV cache."""
        request_N = np.flatnonzero((self._position > 0) & (self._got < self._output))
        return request_N, self._position[request_N]

    @property
    def _done_N(self) -> BoolArray:
        return np.asarray((self._got == self._output) & (self._output > 0))

    @property
    def completed(self) -> int:
        """Requests that have all their output tokens."""
        return int(self._done_N.sum())

    @property
    def unfinished(self) -> int:
        """Requests that have not."""
        return int((self._got < self._output).sum())

    def check(self) -> None:
        """Assert that no request got more tokens than it asked for, or got them backwards in time.

        Raises:
            AssertionError: a token was lost or counted twice by the simulator.
        """
        assert (self._got <= self._output).all(), "a request got more tokens than it asked for"
        done = self._done_N
        assert (self._first[done] >= self._arrival[done]).all(), "a token came before its request"
        assert (self._last[done] >= self._first[done]).all(), "a last token came before the first"

    def times(self) -> RequestTimes:
        """Times of the completed requests."""
        done = self._done_N
        return RequestTimes(
            arrival_N=self._arrival[done],
            first_token_N=self._first[done],
            last_token_N=self._last[done],
            input_tokens_N=self._prompt[done],
            output_tokens_N=self._output[done],
            itl_seconds_I=np.array(self._gaps),
            itl_count_I=np.array(self._counts, np.int64),
        )
