"""Iteration-level batching: requests join and leave at every iteration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from moeless.contracts import Iteration, Request
from moeless.errors import UserError
from moeless.workloads.scheduler import Running, Scheduler
from moeless.workloads.spans import ScheduledIteration, Spans


class Continuous(Scheduler):
    """Continuous batching (Orca, OSDI '22) with chunked prefill (Sarathi-Serve, OSDI '24).

    First come, first served: prompts are prefilled in order of arrival and never overtaken. Where the budget
    cannot hold every decoding request, they take turns.

    Args:
        token_budget: tokens of one iteration at most.
        max_running: admitted requests at most.
        chunked: a prompt may be split over iterations; otherwise it must fit the budget.
        priority: who is given the budget first. ``decode`` keeps tokens flowing, ``prefill`` starts requests
            earlier.
        mixed: prefill and decode may share an iteration; otherwise the one with priority goes alone.
        kv_tokens: cache room, in tokens over all ranks: a request is admitted where its whole length still fits.

    Raises:
        UserError: a limit below one, or a request that could never be served.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        num_ranks: int = 1,
        *,
        token_budget: int = 8192,
        max_running: int = 256,
        chunked: bool = True,
        priority: Literal["decode", "prefill"] = "decode",
        mixed: bool = True,
        kv_tokens: int | None = None,
    ) -> None:
        super().__init__(requests, num_ranks)
        if token_budget < 1 or max_running < 1:
            raise UserError(f"token budget and running limit must be at least 1, got {token_budget} and {max_running}")
        if priority not in ("decode", "prefill"):
            raise UserError(f"priority must be 'decode' or 'prefill', got {priority!r}")
        for request in requests:
            if not chunked and request.prompt_tokens > token_budget:
                raise UserError(
                    f"request {request.id} has {request.prompt_tokens} prompt tokens, more than the token budget of "
                    f"{token_budget}; allow chunked prefill or raise the budget"
                )
            if kv_tokens is not None and request.prompt_tokens + request.output_tokens - 1 > kv_tokens:
                raise UserError(f"request {request.id} alone is longer than the KV cache of {kv_tokens} tokens")
        self._budget = token_budget
        self._max_running = max_running
        self._chunked = chunked
        self._prefill_first = priority == "prefill"
        self._mixed = mixed
        self._kv_free = kv_tokens
        self._prefilling: list[Running] = []
        self._decoding: list[Running] = []
        self._arrived = 0
        self._next_time = -math.inf
        # what the iteration in flight does: the first `len(chunks)` of _prefilling, the first `turn` of _decoding
        self._chunks: list[tuple[int, int, int, bool]] = []
        self._turn = 0

    def next(self, now: float) -> ScheduledIteration | None:
        """As much work as the budget holds; None where nothing runs and nothing has arrived."""
        self._idle()
        if now >= self._next_time:
            self._see_arrivals(now)
        budget, decoding = self._budget, self._decoding
        if decoding and len(decoding) <= budget and not self._prefilling and self._admitted == self._arrived:
            # nearly every iteration of a small batch: all decode, nobody waits
            self._chunks, self._turn = [], len(decoding)
            return self._begin(Spans([], [r.id for r in decoding], [r.position for r in decoding]))
        if not decoding:
            self._turn = 0
            self._chunks = self._plan_prefill(budget, now)
        elif self._prefill_first:
            self._chunks = self._plan_prefill(budget, now)
            left = budget - sum(stop - start for _, start, stop, _ in self._chunks)
            self._turn = min(len(self._decoding), left) if self._mixed or not self._chunks else 0
        else:
            self._turn = min(len(self._decoding), budget)
            left = budget - self._turn
            self._chunks = self._plan_prefill(left, now) if self._mixed and left else []
        if not self._chunks and not self._turn:
            return None
        turn = self._decoding if self._turn == len(self._decoding) else self._decoding[: self._turn]
        return self._begin(Spans(self._chunks, [r.id for r in turn], [r.position for r in turn]))

    def _see_arrivals(self, now: float) -> None:
        requests, index = self._requests, self._arrived
        while index < len(requests) and requests[index].arrival <= now:
            index += 1
        self._arrived = index
        self._next_time = requests[index].arrival if index < len(requests) else math.inf

    def _plan_prefill(self, budget: int, now: float) -> list[tuple[int, int, int, bool]]:
        """Chunks for prompts under way, then for newly admitted requests, within ``budget`` tokens."""
        chunks: list[tuple[int, int, int, bool]] = []
        index = 0
        while budget > 0:
            if index == len(self._prefilling):
                if self._admitted == self._arrived or not self._room(self._requests[self._admitted], budget):
                    break
                request = self._requests[self._admitted]
                self._waits.append(now - request.arrival)
                running = self._admit(request)
                if self._kv_free is not None:
                    self._kv_free -= running.total
                self._prefilling.append(running)
            running = self._prefilling[index]
            stop = min(running.prompt, running.position + budget)
            chunks.append((running.id, running.position, stop, stop == running.prompt))
            budget -= stop - running.position
            index += 1
        return chunks

    def _room(self, request: Request, budget: int) -> bool:
        if self.draining or self.num_running >= self._max_running:
            return False
        if self._kv_free is not None and request.prompt_tokens + request.output_tokens - 1 > self._kv_free:
            return False
        return self._chunked or request.prompt_tokens <= budget

    def complete(self, iteration: Iteration, now: float) -> None:
        """Advance what was scheduled, release what has finished."""
        self._end(iteration)
        decoding, turn = self._decoding, self._turn
        ended = False
        for running in decoding if turn == len(decoding) else decoding[:turn]:
            running.position += 1
            ended = ended or running.position == running.total
        if not ended and not self._chunks and turn == len(decoding):
            return
        begun: list[Running] = []
        for running, (_, _, stop, ends) in zip(self._prefilling, self._chunks, strict=False):
            running.position = stop
            if ends:
                begun.append(running)
        # prompts are served in order and only the last chunk of an iteration can leave one unfinished
        del self._prefilling[: len(begun)]
        if turn < len(decoding):
            decoding = decoding[turn:] + decoding[:turn]
        if ended:
            for running in decoding:
                if running.position == running.total:
                    self._free(running)
            decoding = [running for running in decoding if running.position < running.total]
        for running in begun:
            if running.position == running.total:
                self._free(running)
            else:
                decoding.append(running)
        self._decoding = decoding

    def steady(self) -> tuple[int, float]:
        """Pure decode steps repeat until the first request ends or the next one arrives."""
        if self._in_flight is None or self._chunks or self._turn < len(self._decoding):
            return 1, math.inf
        arrival = self._requests[self._arrived].arrival if self._arrived < len(self._requests) else math.inf
        return min(running.total - running.position for running in self._decoding), arrival

    def skip(self, steps: int) -> None:
        """Advance the decoding requests ahead of the step in flight."""
        if steps and steps >= self.steady()[0]:
            raise RuntimeError(f"only {self.steady()[0]} decode steps are steady, the last of them is completed")
        for running in self._decoding:
            running.position += steps
        self._iterations += steps

    def _free(self, running: Running) -> None:
        self._release(running)
        if self._kv_free is not None:
            self._kv_free += running.total

    def next_arrival(self, now: float) -> float | None:
        """Arrival of the first request that has not arrived by ``now``, None after the last."""
        self._see_arrivals(now)
        return self._requests[self._arrived].arrival if self._arrived < len(self._requests) else None

    def finish(self, request: int) -> None:
        """End a decoding request early."""
        self._idle()
        for running in self._decoding:
            if running.id == request:
                self._free(running)
                self._decoding.remove(running)
                return
        raise KeyError(request)

    @property
    def num_waiting(self) -> int:
        """Requests that have arrived, as far as the scheduler was told the time, and are not admitted."""
        return self._arrived - self._admitted
