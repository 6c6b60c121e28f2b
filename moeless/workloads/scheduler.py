"""What every scheduler shares: the protocol, owner ranks, queueing delays.

A request of P prompt and O output tokens computes P + O - 1 positions: the prefill covers positions 0 to P
and yields the first output token; each decode step feeds one token back, at positions P to P + O - 2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import numpy as np

from moeless.contracts import FloatArray, Iteration, Request
from moeless.errors import UserError
from moeless.workloads.spans import ScheduledIteration, Spans


@dataclass(frozen=True)
class Queueing:
    """How long work waited before it began, in order of admission.

    Attributes:
        wait_N: seconds between being ready and being begun, per request (or per batch).
        piled_up: the waits grew over the run, so the workload exceeds what is served and request-level
            latency depends on how long one measures.
    """

    wait_N: FloatArray
    piled_up: bool

    @classmethod
    def judge(cls, waits: Sequence[float] | FloatArray) -> Queueing:
        """Piled up: the last quarter waited a second or more on average, and 1.5 times the first half."""
        wait = np.asarray(waits, np.float64)
        if len(wait) < 4:
            return cls(wait, False)
        late, early = wait[-(len(wait) // 4) :].mean(), wait[: len(wait) // 2].mean()
        return cls(wait, bool(late >= 1.0 and late >= 1.5 * early))


class Running:
    """A request that has been admitted; ``position`` is the next one to compute, ``total`` the number of them."""

    __slots__ = ("id", "position", "prompt", "rank", "total")

    def __init__(self, request: Request, rank: int) -> None:
        self.id = request.id
        self.position = 0
        self.prompt = request.prompt_tokens
        self.total = request.prompt_tokens + request.output_tokens - 1
        self.rank = rank


class Scheduler(ABC):
    """Turns requests into iterations; the clock belongs to the caller.

    Call :meth:`next`, execute what it returns, call :meth:`complete` with the time at which it ended. Where
    ``next`` returns None, nothing can run before :meth:`next_arrival`; None there as well means that all is done.

    Args:
        requests: ascending by arrival, with distinct ids.
        num_ranks: data-parallel ranks; each request is owned by the one with the fewest tokens of admitted,
            unfinished requests, ties to the lowest rank.

    Raises:
        UserError: requests out of order, ids twice, lengths below one, no rank.
    """

    def __init__(self, requests: Sequence[Request], num_ranks: int = 1) -> None:
        if num_ranks < 1:
            raise UserError(f"a scheduler needs at least one rank, got {num_ranks}")
        for before, after in pairwise(requests):
            if after.arrival < before.arrival:
                raise UserError(f"request {after.id} arrives before request {before.id}; sort requests by arrival")
        for request in requests:
            if request.prompt_tokens < 1 or request.output_tokens < 1:
                raise UserError(f"request {request.id} needs at least one prompt and one output token")
        if len({request.id for request in requests}) != len(requests):
            raise UserError("two requests of the workload have one id")
        self._requests = requests
        self._admitted = 0
        self._finished = 0
        self._rank_load = [0] * num_ranks
        self._rank_of_request: dict[int, int] = {}
        self._ranks = MappingProxyType(self._rank_of_request)
        self._waits: list[float] = []
        self._iterations = 0
        self._in_flight: ScheduledIteration | None = None
        #: no request is admitted while this is set; the running ones go on
        self.draining = False

    @abstractmethod
    def next(self, now: float) -> ScheduledIteration | None:
        """The iteration to execute at ``now`` seconds, None where nothing can run."""

    @abstractmethod
    def complete(self, iteration: Iteration, now: float) -> None:
        """Tell that the iteration ended at ``now`` seconds."""

    @abstractmethod
    def next_arrival(self, now: float) -> float | None:
        """The first time after ``now`` at which new work is ready, None where none will be."""

    @abstractmethod
    def finish(self, request: int) -> None:
        """End an admitted request early (a stop token); between ``complete`` and ``next`` only."""

    def steady(self) -> tuple[int, float]:
        """How the iteration in flight may be repeated: steps, and a deadline in seconds.

        That many iterations, the one in flight included, are decode steps of the same requests, each one position
        further, as long as they begin before the deadline. (1, infinity) where nothing is known.
        """
        return 1, math.inf

    def skip(self, steps: int) -> None:
        """Take ``steps`` of the steady decode steps as done, ahead of the one that :meth:`complete` ends."""
        if steps:
            raise RuntimeError("this scheduler has no steady steps")

    @property
    def done(self) -> bool:
        """Every request has been served."""
        return self._finished == len(self._requests)

    @property
    def num_running(self) -> int:
        """Requests admitted and not finished."""
        return self._admitted - self._finished

    @property
    def num_waiting(self) -> int:
        """Requests that could be admitted, as far as the scheduler was told the time, and are not."""
        return 0

    @property
    def num_finished(self) -> int:
        """Requests served to their end."""
        return self._finished

    def queueing(self) -> Queueing:
        """Waits so far, and whether they grew."""
        return Queueing.judge(self._waits)

    def _admit(self, request: Request) -> Running:
        loads = self._rank_load
        running = Running(request, loads.index(min(loads)))
        loads[running.rank] += running.total
        self._rank_of_request[request.id] = running.rank
        self._admitted += 1
        return running

    def _release(self, running: Running) -> None:
        self._rank_load[running.rank] -= running.total
        self._finished += 1

    def _begin(self, spans: Spans) -> ScheduledIteration:
        self._in_flight = ScheduledIteration(self._iterations, spans, self._ranks)
        self._iterations += 1
        return self._in_flight

    def _idle(self) -> None:
        if self._in_flight is not None:
            raise RuntimeError(f"iteration {self._in_flight.id} has not been completed")

    def _end(self, iteration: Iteration) -> None:
        if self._in_flight is None or iteration.id != self._in_flight.id:
            raise RuntimeError(f"iteration {iteration.id} is not the one in flight")
        self._in_flight = None
