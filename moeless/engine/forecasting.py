"""Forecasts that have a layer's time to be made: beside its experts, on a thread and, on a GPU, in a stream of its own.

A forecast for the next layer must be in this layer's gather, so it is made on the critical path. One for a later layer
is made after this layer's dispatch was decided and carried by the next layer's gather.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from moeless.contracts import IntArray
from moeless.engine.core import PartTimes


class Forecasting:
    """One rank's forecasts on their way; at most one layer's at a time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(1, "moeless-forecasts")
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._asked: Future[tuple[IntArray, float]] | None = None
        self._own_at_ask = 0.0

    def ask(self, make: Callable[[], IntArray], input_TH: torch.Tensor) -> None:
        """Have words made from a layer's gate inputs, which the current stream has computed or will have."""
        after = None
        if self._stream is not None:
            after = torch.cuda.current_stream().record_event()
            # the allocator must not hand these bytes on while the other stream reads them
            input_TH.record_stream(self._stream)

        def work() -> tuple[IntArray, float]:
            started = time.thread_time()
            if self._stream is None:
                return make(), time.thread_time() - started
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(after)
                return make(), time.thread_time() - started

        self._own_at_ask = time.thread_time()
        self._asked = self._pool.submit(work)

    def collect(self, times: PartTimes) -> IntArray | None:
        """The words asked for at the layer before, None where nothing was; waits for them."""
        if self._asked is None:
            return None
        hidden, began = time.thread_time() - self._own_at_ask, time.perf_counter()
        words, own = self._asked.result()
        self._asked = None
        times.forecast_beside += own
        times.forecast_beside_wait += time.perf_counter() - began
        times.forecast_beside_exposed += max(0.0, own - hidden)
        return words

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)
