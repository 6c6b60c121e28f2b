"""The serving loop of one rank: the same schedule on every rank, each running its own requests' tokens.

Every rank holds the same scheduler and is told the same time, rank 0's, once an iteration; no other word is needed to
stay in lockstep. Attention is data-parallel: a request lives on the rank that the scheduler gave it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import torch

from moeless.contracts import Iteration, Request
from moeless.engine.elastic import ElasticExperts
from moeless.engine.exchange import Exchange
from moeless.engine.flat import FlatBatch, FlatSpan
from moeless.engine.hosts.base import Host
from moeless.workloads.scheduler import Scheduler

#: What is kept of a layer's routing, and as what.
_ROUTING = (("experts", np.uint16), ("weights", np.float16), ("inputs", np.float16))


@dataclass(frozen=True)
class LiveRequest:
    """A request with its prompt's tokens."""

    request: Request
    token_P: tuple[int, ...]


@dataclass
class Served:
    """What a rank knows after the run.

    Attributes:
        token_times: request to the seconds at which its tokens came (own requests).
        outputs: request to its generated tokens.
        logits: request to the float32 logits of its generated tokens, where kept.
        nll: summed negative log-likelihood of prompt tokens and their number, where asked for.
        start_I, end_I: of every iteration, seconds since the start; ``tokens_I``, ``phase_I`` likewise.
    """

    token_times: dict[int, list[float]] = field(default_factory=dict)
    outputs: dict[int, list[int]] = field(default_factory=dict)
    logits: dict[int, list[np.ndarray]] = field(default_factory=dict)  # type: ignore[type-arg]
    nll: tuple[float, int] = (0.0, 0)
    start_I: list[float] = field(default_factory=list)
    end_I: list[float] = field(default_factory=list)
    tokens_I: list[int] = field(default_factory=list)
    phase_I: list[int] = field(default_factory=list)
    recorded: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class LoopSettings:
    """How the loop chooses and keeps tokens.

    Attributes:
        temperature: 0 is greedy; above it, sampled by (seed, request, position).
        top_p: sample among the most likely tokens that together have this probability.
        keep_logits: keep every generated token's logits, for verification.
        prompt_nll: score the prompts' own tokens.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    keep_logits: bool = False
    prompt_nll: bool = False


class ServingLoop:
    """Runs a workload on one rank.

    Args:
        finished: file that gets one JSON line per finished request of this rank, at once.
    """

    def __init__(
        self,
        host: Host,
        experts: ElasticExperts,
        exchange: Exchange,
        scheduler: Scheduler,
        requests: Sequence[LiveRequest],
        settings: LoopSettings,
        finished: IO[str] | None = None,
    ) -> None:
        self.host, self.experts, self.exchange, self.scheduler = host, experts, exchange, scheduler
        self.requests = {live.request.id: live for live in requests}
        self.settings, self.finished = settings, finished
        self.rank = exchange.ranks.rank
        self.served = Served()
        host.moe = experts

    def run(self) -> Served:
        """Serve everything; collective."""
        self.host.cache.clear()
        self.exchange.barrier()
        epoch = time.perf_counter()
        while True:
            now = self.exchange.first_rank(time.perf_counter() - epoch)
            iteration = self.scheduler.next(now)
            if iteration is None:
                arrival = self.scheduler.next_arrival(now)
                if arrival is None:
                    break
                time.sleep(max(0.0, min(arrival - now, 0.05)))
                continue
            self._iterate(iteration, now)
            end = self.exchange.first_rank(time.perf_counter() - epoch)
            self._note(iteration, now, end)
            self.scheduler.complete(iteration, end)
        return self.served

    def _iterate(self, iteration: Iteration, now: float) -> None:
        ranks = [iteration.rank_of_request[span.request] for span in iteration.spans]
        own = [span for span, rank in zip(iteration.spans, ranks, strict=True) if rank == self.rank]
        self.experts.first_token = sum(
            span.stop - span.start for span, rank in zip(iteration.spans, ranks, strict=True) if rank < self.rank
        )
        self._emitted: list[int] = []
        if not own:
            self.experts.controller.begin(iteration.phase, iteration.tokens, now)
            self.host.idle_step()
            self.experts.routing.clear()
            return
        spans: list[FlatSpan] = []
        tokens: list[int] = []
        emits: list[tuple[int, int, int]] = []
        row = 0
        for span in own:
            live = self.requests[span.request]
            sequence = (*live.token_P, *self.served.outputs.get(span.request, ()))
            tokens.extend(sequence[span.start : span.stop])
            capacity = live.request.prompt_tokens + live.request.output_tokens
            spans.append(FlatSpan(span.request, span.start, span.stop, capacity))
            row += span.stop - span.start
            if span.stop >= live.request.prompt_tokens:
                emits.append((span.request, span.stop, row - 1))
        self.experts.controller.begin(iteration.phase, iteration.tokens, now, np.array(tokens, np.int64))
        positions = [position for span in own for position in range(span.start, span.stop)]
        wanted = list(range(row)) if self.settings.prompt_nll else [at for _, _, at in emits]
        device = self.host.device
        batch = FlatBatch(
            spans,
            torch.tensor(tokens, dtype=torch.int64, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
            torch.tensor(wanted, dtype=torch.int64, device=device),
        )
        logits_NV = self.host.step(batch).cpu()
        if self.settings.prompt_nll:
            self._score(own, logits_NV)
            logits_NV = logits_NV[[at for _, _, at in emits]]
        for (request, position, _), row_V in zip(emits, logits_NV, strict=True):
            self.served.outputs.setdefault(request, []).append(self._choose(row_V, request, position))
            if self.settings.keep_logits:
                self.served.logits.setdefault(request, []).append(row_V.numpy())
            self._emitted.append(request)
        if self.experts.record:
            self._record(iteration, own, tokens, positions)

    def _choose(self, row_V: torch.Tensor, request: int, position: int) -> int:
        settings = self.settings
        if settings.temperature == 0.0:
            return int(row_V.argmax())
        return sample(row_V, settings.temperature, settings.top_p, (settings.seed, request, position))

    def _score(self, own: Sequence[Any], logits_NV: torch.Tensor) -> None:
        total, count = self.served.nll
        row = 0
        for span in own:
            prompt = self.requests[span.request].token_P
            following = prompt[span.start + 1 : span.stop + 1]
            rows = logits_NV[row : row + len(following)].double()
            if following:
                logp = torch.log_softmax(rows, -1)
                total -= float(logp[torch.arange(len(following)), torch.tensor(following)].sum())
                count += len(following)
            row += span.stop - span.start
        self.served.nll = (total, count)

    def _note(self, iteration: Iteration, start: float, end: float) -> None:
        served = self.served
        served.start_I.append(start)
        served.end_I.append(end)
        served.tokens_I.append(iteration.tokens)
        served.phase_I.append(int(iteration.phase))
        for request in self._emitted:
            times = served.token_times.setdefault(request, [])
            times.append(end)
            wanted = self.requests[request].request
            if len(times) == wanted.output_tokens:
                self.host.cache.release(request)
                if self.finished is not None:
                    line = {
                        "request": request,
                        "arrival": wanted.arrival,
                        "prompt_tokens": wanted.prompt_tokens,
                        "token_times": times,
                        "tokens": served.outputs[request],
                    }
                    self.finished.write(json.dumps(line) + "\n")
                    self.finished.flush()

    def _record(self, iteration: Iteration, own: Sequence[Any], tokens: list[int], positions: list[int]) -> None:
        phase = [int(span.phase) for span in own for _ in range(span.stop - span.start)]
        request = [span.request for span in own for _ in range(span.stop - span.start)]
        self.served.recorded.append(
            {
                "iteration": np.full(len(tokens), iteration.id),
                "request": np.array(request),
                "position": np.array(positions),
                "phase": np.array(phase, np.uint8),
                "token": np.array(tokens),
                **{
                    name: np.stack(layers, 1).astype(kind)
                    for (name, kind), layers in zip(_ROUTING, zip(*self.experts.routing, strict=True), strict=False)
                },
            }
        )
        self.experts.routing.clear()


def sample(row_V: torch.Tensor, temperature: float, top_p: float, seed: tuple[int, ...]) -> int:
    """A token drawn from logits ``[V]``; the same for the same seed, whatever else runs."""
    shares_V = torch.softmax(row_V.double() / temperature, -1).numpy()
    # likeliest first, ties by index
    order = np.argsort(-shares_V, kind="stable")
    total = np.cumsum(shares_V[order])
    kept = order[: int(np.searchsorted(total, min(top_p, float(total[-1])))) + 1]
    shares = shares_V[kept] / shares_V[kept].sum()
    return int(np.random.default_rng(seed).choice(kept, p=shares))
