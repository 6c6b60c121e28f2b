"""The paper's batching: the requests of one second form one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moeless.contracts import Iteration, Request
from moeless.errors import UserError
from moeless.workloads.scheduler import Running, Scheduler
from moeless.workloads.spans import ScheduledIteration, Spans


class OneSecond(Scheduler):
    """Batches by arrival second, each served to its end before the next (arXiv 2603.06350, evaluation).

    A batch is ready when its second is over; it runs one prefill of all its prompts, then decode steps until
    its longest output is done. There is no admission in between, so it saturates easily: see ``queueing()``,
    whose waits are per batch.

    Args:
        period: length of a batch's window, in seconds.
    """

    def __init__(self, requests: Sequence[Request], num_ranks: int = 1, *, period: float = 1.0) -> None:
        super().__init__(requests, num_ranks)
        if not (period > 0 and math.isfinite(period)):
            raise UserError(f"the batching period must be a positive number of seconds, got {period}")
        self._period = period
        self._batch: list[Running] = []

    def _ready(self, request: Request) -> float:
        """When the batch that this request belongs to is complete."""
        return (math.floor(request.arrival / self._period) + 1) * self._period

    def next(self, now: float) -> ScheduledIteration | None:
        """The batch's prefill or next decode step; None where no batch is ready."""
        self._idle()
        if not self._batch:
            if self._admitted == len(self._requests):
                return None
            ready = self._ready(self._requests[self._admitted])
            if now < ready:
                return None
            self._waits.append(now - ready)
            while self._admitted < len(self._requests) and self._ready(self._requests[self._admitted]) == ready:
                self._batch.append(self._admit(self._requests[self._admitted]))
        if self._batch[0].position == 0:
            return self._begin(Spans([(r.id, 0, r.prompt, True) for r in self._batch], [], []))
        return self._begin(Spans([], [r.id for r in self._batch], [r.position for r in self._batch]))

    def complete(self, iteration: Iteration, now: float) -> None:
        """Advance every request of the batch."""
        self._end(iteration)
        left = []
        for running in self._batch:
            running.position = running.position + 1 if running.position else running.prompt
            if running.position == running.total:
                self._release(running)
            else:
                left.append(running)
        self._batch = left

    def steady(self) -> tuple[int, float]:
        """A batch's decode steps repeat until its first request ends; arrivals do not interrupt it."""
        if self._in_flight is None or not self._batch or self._batch[0].position == 0:
            return 1, math.inf
        return min(running.total - running.position for running in self._batch), math.inf

    def skip(self, steps: int) -> None:
        """Advance the batch ahead of the step in flight."""
        if steps and steps >= self.steady()[0]:
            raise RuntimeError(f"only {self.steady()[0]} decode steps are steady, the last of them is completed")
        for running in self._batch:
            running.position += steps
        self._iterations += steps

    def next_arrival(self, now: float) -> float | None:
        """When the next batch is complete (``now`` where it already is), None after the last."""
        if self._admitted == len(self._requests):
            return None
        return max(now, self._ready(self._requests[self._admitted]))

    def finish(self, request: int) -> None:
        """End a request of the current batch early."""
        self._idle()
        for running in self._batch:
            if running.id == request:
                self._release(running)
                self._batch.remove(running)
                return
        raise KeyError(request)

    @property
    def num_waiting_batches(self) -> int:
        """Batches with requests that have not begun."""
        return len({self._ready(request) for request in self._requests[self._admitted :]})
