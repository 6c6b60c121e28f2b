"""A small model, its made-up routing, and the smallest scheduler that keeps the contract."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import strategies as st

from moeless.cluster import Cluster
from moeless.contracts import Forecast, Iteration, Phase, Policy, Request, Span
from moeless.costs import COSTS
from moeless.policy import ResolvedPolicy, resolve
from moeless.predictors import LoadPredictor
from moeless.simulator import Replay
from moeless.simulator.failures import Failure
from moeless.spec import Attention, MoESpec
from moeless.workloads.lengths import Workload
from moeless.workloads.scheduler import Scheduler

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


class OneByOne(Scheduler):
    """Serves requests in order of arrival, one token a time, nothing batched."""

    def __init__(self, requests: list[Request]) -> None:
        super().__init__(requests)
        self.index, self.position = 0, 0

    def next(self, now: float) -> Iteration | None:
        if self.index == len(self._requests) or self._requests[self.index].arrival > now:
            return None
        request = self._requests[self.index]
        stop = request.prompt_tokens if self.position == 0 else self.position + 1
        phase = Phase.PREFILL if self.position == 0 else Phase.DECODE
        return Iteration(self.index, (Span(request.id, self.position, stop, phase),), {request.id: 0})

    def complete(self, iteration: Iteration, now: float) -> None:
        request = self._requests[self.index]
        self.position = iteration.spans[0].stop
        if self.position == request.prompt_tokens + request.output_tokens - 1:
            self.index, self.position = self.index + 1, 0
            self._admitted = self._finished = self.index

    def next_arrival(self, now: float) -> float | None:
        return self._requests[self.index].arrival if self.index < len(self._requests) else None

    def finish(self, request: int) -> None:
        raise NotImplementedError


def one_step_at_a_time(scheduler: Scheduler) -> Scheduler:
    """Have a scheduler hide that its decode steps repeat."""
    scheduler.steady = lambda: (1, math.inf)
    return scheduler


class LastLoad(LoadPredictor):
    """Forecasts what the target layer had last time, or even shares."""

    name = "last"

    def __init__(self):
        pass

    def predict(self, context, layer, distance):
        load_E = np.ones(8) if context.last_load_E is None else np.asarray(context.last_load_E, np.float64)
        mean_E = load_E / load_E.sum() * context.tokens * 2
        return Forecast(mean_E, mean_E.copy(), context.tokens, "last")


def runtime_of(policy: str, spec: MoESpec, where: Cluster) -> ResolvedPolicy:
    """A policy under roofline costs with one extra slot; ``last`` forecasts are :class:`LastLoad`'s."""
    return resolve(
        Policy.parse(policy),
        spec=spec,
        cluster=where,
        costs=COSTS.get("roofline")(spec, where),
        extra_slots=1,
        predictors={"last": LastLoad()},
    )


@st.composite
def losses(draw, first_gpu, gpus, most, seconds):
    """Up to ``most`` losses of GPUs and copies in the first ``seconds``; GPUs before ``first_gpu`` stay."""
    found = []
    for _ in range(draw(st.integers(1, most))):
        copy = draw(st.booleans())
        found.append(
            Failure(
                draw(st.floats(0.0, seconds)),
                draw(st.integers(first_gpu, gpus - 1)),
                layer=draw(st.integers(0, 2)) if copy else None,
                expert=draw(st.integers(0, 7)) if copy else None,
                restart_seconds=draw(st.sampled_from([1e-4, 0.004, 0.02, 100.0])),
                detection_seconds=draw(st.sampled_from([0.0, 0.001])),
            )
        )
    return tuple(found)


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
