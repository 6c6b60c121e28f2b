"""A small model, its made-up routing, and the smallest scheduler that keeps the contract."""

from __future__ import annotations

import numpy as np
import pytest

from moeless.contracts import Iteration, Phase, Request, Span
from moeless.costs import COSTS
from moeless.simulator import Replay
from moeless.spec import Attention, MoESpec
from moeless.workloads.lengths import Workload

SPEC = MoESpec(
    name="small",
    hidden_size=256,
    num_layers=3,
    moe_layers=(0, 1, 2),
    num_experts=8,
    top_k=2,
    expert_intermediate_size=512,
    attention=Attention(heads=4, kv_heads=2, head_dim=64),
    vocab_size=1000,
)


class OneByOne:
    """Serves requests in order of arrival, one token a time, nothing batched."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests, self.index, self.position = requests, 0, 0

    def next(self, now: float) -> Iteration | None:
        if self.index == len(self.requests) or self.requests[self.index].arrival > now:
            return None
        request = self.requests[self.index]
        stop = request.prompt_tokens if self.position == 0 else self.position + 1
        phase = Phase.PREFILL if self.position == 0 else Phase.DECODE
        return Iteration(self.index, (Span(request.id, self.position, stop, phase),), {request.id: 0})

    def complete(self, iteration: Iteration, now: float) -> None:
        request = self.requests[self.index]
        self.position = iteration.spans[0].stop
        if self.position == request.prompt_tokens + request.output_tokens - 1:
            self.index, self.position = self.index + 1, 0

    def next_arrival(self, now: float) -> float | None:
        return self.requests[self.index].arrival if self.index < len(self.requests) else None


@pytest.fixture(scope="session")
def one_by_one() -> type[OneByOne]:
    return OneByOne


@pytest.fixture(scope="session")
def spec() -> MoESpec:
    return SPEC


@pytest.fixture(scope="session")
def topk() -> np.ndarray:
    """Skewed routing of 40 requests of 20 tokens: expert e is chosen in proportion to 1 / (e + 1)."""
    random = np.random.default_rng(0)
    weight = 1.0 / np.arange(1, SPEC.E + 1)
    keys = np.log(weight) + random.gumbel(size=(800, SPEC.L, SPEC.E))
    # another order of popularity in every layer
    for layer in range(SPEC.L):
        keys[:, layer] = keys[:, layer, random.permutation(SPEC.E)]
    return np.argsort(-keys, axis=-1)[:, :, : SPEC.K].astype(np.uint16)


@pytest.fixture(scope="session")
def requests() -> list[Request]:
    return [Request(i, 0.001 * i, 8, 13, trace_request=i) for i in range(40)]


def _replay(num_ranks: int, topk_TLK: np.ndarray, chosen: list[Request]) -> Replay:
    base = np.zeros(len(chosen), np.int64)
    for request in chosen:
        base[request.id] = 20 * request.trace_request
    return Replay(topk_TLK, Workload(tuple(chosen), False, (), base), SPEC.E, num_ranks)


@pytest.fixture
def replay_for(topk, requests):
    def make(num_ranks: int, topk_TLK: np.ndarray = topk, chosen: list[Request] = requests) -> Replay:
        return _replay(num_ranks, topk_TLK, chosen)

    return make


@pytest.fixture(scope="session")
def replay_of():
    return _replay


@pytest.fixture(params=["paper", "roofline"])
def costs_name(request) -> str:
    COSTS.get(request.param)
    return request.param
