"""The gap-closed protocol: real routing, H100-class constants, six regimes, static EP and a lower bound.

Gap closed is the ratio of sums Σ(T_static − T) / Σ(T_static − T_bound) over (iteration, layer) pairs: 0 is no
better than static EP, 1 is the bound. Requests are split 70/30 (seed 0); history is the training part's mean load,
iterations come from the test part only.

Axes: I iterations, B (iteration, layer) pairs, L layers, E experts, K experts per token, T tokens.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from moeless.cluster import Cluster, cluster
from moeless.contracts import FloatArray, IntArray, Phase
from moeless.costs.layer_time import LayerCosts
from moeless.costs.roofline import RooflineCosts
from moeless.spec import MoESpec, preset

SEED = 0
PAIRS = 216


@dataclass(frozen=True)
class Regime:
    """Iterations of one phase and size."""

    phase: Phase
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.phase.name.lower()} {self.tokens}"


REGIMES = (
    *(Regime(Phase.PREFILL, n) for n in (16384, 4096, 1024)),
    *(Regime(Phase.DECODE, n) for n in (32, 256, 2048)),
)


@dataclass(frozen=True, eq=False)
class Routing:
    """Routing with its split: ``topk_TLK``, rows of each request, training and test requests."""

    name: str
    topk_TLK: np.ndarray
    offsets: np.ndarray
    train: np.ndarray
    test: np.ndarray
    spec: MoESpec
    synthetic: bool = False

    def loads(self, rows: np.ndarray) -> IntArray:
        """Load of the rows, ``[L, E]``."""
        layers, experts = self.topk_TLK.shape[1], self.spec.E
        flat = self.topk_TLK[rows].astype(np.int64) + np.arange(layers)[:, None] * experts
        return np.bincount(flat.reshape(-1), minlength=layers * experts).reshape(layers, experts)

    def request_rows(self, request: int) -> np.ndarray:
        return np.arange(self.offsets[request], self.offsets[request + 1])


def protocol_spec() -> MoESpec:
    """gpt-oss shapes with bf16 experts and no biases."""
    shapes = preset("gpt-oss-20b").with_expert_dtype("bfloat16").to_json()
    return MoESpec.from_json(shapes | {"expert_bias": False})


def routing_path() -> Path:
    """gpt-oss-20b's routing in the development data."""
    root = Path(os.environ.get("MOELESS_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    path = root / "routing" / "gpt-oss-20b.npz"
    if not path.exists():
        raise SystemExit("needs the development data: set MOELESS_SHARED_DATA to its folder")
    return path


def load_routing(path: Path | None = None) -> Routing:
    """gpt-oss-20b's routing of 615 requests, from its file or the development data."""
    with np.load(path or routing_path()) as data:
        topk, offsets = data["experts"], data["offsets"]
    return Routing("gpt-oss-20b", topk, offsets, *_split(len(offsets) - 1), protocol_spec())


def synthetic_routing(name: str, layers: int = 12, requests: int = 240) -> Routing:
    """Made-up routing with a preset's experts and top-k, bf16 weights; so many of its layers stand for all.

    The generator's spreads are those found for gpt-oss-20b.
    """
    # what needs pyarrow stays out of the programs that run where torch is all there is
    from moeless.traces.synthetic import SyntheticParams, synthetic_model

    full = preset(name).with_expert_dtype("bfloat16")
    spec = dataclasses.replace(full, num_layers=layers, moe_layers=tuple(range(layers)))
    model = synthetic_model(spec, SyntheticParams(), seed=SEED)
    parts = []
    for request in range(requests):
        rng = np.random.default_rng([SEED, 2, request])
        parts.append(model.request(int(np.clip(rng.geometric(1 / 256), 64, 1024)), rng)[1])
    offsets = np.cumsum([0, *map(len, parts)])
    return Routing(name, np.concatenate(parts), offsets, *_split(requests), spec, synthetic=True)


def _split(requests: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and test requests, 70/30; the same as ``moeless.predictors.request_split``."""
    order = np.random.default_rng(SEED).permutation(requests)
    cut = round(0.7 * requests)
    return np.sort(order[:cut]), np.sort(order[cut:])


def history_share_LE(routing: Routing) -> FloatArray:
    """The training part's mean load, each layer summing to 1."""
    load = routing.loads(np.concatenate([routing.request_rows(r) for r in routing.train])).astype(float)
    return load / load.sum(1, keepdims=True)


def sample_rows(routing: Routing, regime: Regime, rng: np.random.Generator, requests: np.ndarray) -> np.ndarray:
    """Rows of one iteration: consecutive requests cut at n tokens, or one token of each of n drawn requests."""
    if regime.phase == Phase.PREFILL:
        rows: list[np.ndarray] = []
        at = int(rng.integers(len(requests)))
        while sum(map(len, rows)) < regime.tokens:
            rows.append(routing.request_rows(int(requests[at % len(requests)])))
            at += 1
        return np.concatenate(rows)[: regime.tokens]
    drawn = rng.choice(requests, regime.tokens)
    first, stop = routing.offsets[drawn], routing.offsets[drawn + 1]
    return first + (rng.random(regime.tokens) * (stop - first)).astype(np.int64)


def sample_iterations(routing: Routing, regime: Regime, pairs: int = PAIRS) -> list[np.ndarray]:
    """Rows of the iterations of the test requests that hold at least so many (iteration, layer) pairs."""
    rng = np.random.default_rng([SEED, int(regime.phase), regime.tokens])
    count = -(-pairs // routing.topk_TLK.shape[1])
    return [sample_rows(routing, regime, rng, routing.test) for _ in range(count)]


class ProtocolCosts(RooflineCosts):
    """Roofline compute; every token travels, wherever it came from, as the protocol's formula has it."""

    def make_layer_costs(self) -> LayerCosts:
        costs = super().make_layer_costs()
        # what travels counts by bytes alone; the latency of both directions is the same whatever travels
        return costs._replace(
            local_is_free=False,
            slow_bytes_per_second=costs.fast_bytes_per_second,
            misc_seconds=2.0 * self.terms().latency_seconds,
        )


@lru_cache(maxsize=64)
def protocol_costs(num_gpus: int = 8, spec: MoESpec | None = None, control: bool = False) -> ProtocolCosts:
    """H100 constants on one switch: 700 TFLOP/s, 3.0 TB/s, 3 µs launch, 300 GB/s, 10 µs."""
    machine: Cluster = cluster("h100x8")
    if num_gpus != machine.num_gpus:
        machine = Cluster(
            f"h100-switch-{num_gpus}", machine.device, num_gpus, num_gpus, num_gpus, machine.fast, machine.slow
        )
    return ProtocolCosts(spec or protocol_spec(), machine, charge_control=control)


def pair_seconds(tokens_BR: IntArray, gpu_R: IntArray, costs: RooflineCosts) -> FloatArray:
    """Protocol time of each pair, ``[B]``: every token travels, wherever it came from."""
    terms, gpus = costs.terms(), costs.cluster.num_gpus
    tokens = np.atleast_2d(tokens_BR).astype(float)
    busy = np.where(tokens > 0, np.maximum(tokens * terms.token_seconds, terms.floor_seconds), 0.0)
    onto = np.eye(gpus)[gpu_R]
    return (
        (busy @ onto).max(1)
        + terms.launch_seconds
        + 2 * ((tokens @ onto).max(1) * terms.link_seconds + terms.latency_seconds)
    )


def bound_seconds(load_BE: IntArray, costs: RooflineCosts) -> FloatArray:
    """The protocol's T_bound of each pair, ``[B]``."""
    terms, gpus = costs.terms(), costs.cluster.num_gpus
    busy = np.where(load_BE > 0, np.maximum(load_BE * terms.token_seconds, terms.floor_seconds), 0.0)
    return (
        np.maximum(busy.sum(1) / gpus, terms.floor_seconds)
        + terms.launch_seconds
        + 2 * (load_BE.sum(1) / gpus * terms.link_seconds + terms.latency_seconds)
    )


def gap_closed(static_B: FloatArray, time_B: FloatArray, bound_B: FloatArray) -> tuple[float, float, float]:
    """Ratio of sums with its bootstrap 90 % interval."""
    gain, room = static_B - time_B, static_B - bound_B
    rng = np.random.default_rng(SEED)
    drawn = rng.integers(0, len(gain), (2000, len(gain)))
    low, high = np.quantile(gain[drawn].sum(1) / room[drawn].sum(1), [0.05, 0.95])
    return float(gain.sum() / room.sum()), float(low), float(high)
