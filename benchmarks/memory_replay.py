"""Consecutive iterations of the real trace under extra copies that come and go: time against memory held.

Axes: I iterations, L layers, E experts, R replicas, S source ranks, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from gap_protocol import SEED, Regime, Routing, pair_seconds

from moeless.contracts import InstanceState, IntArray, LayerPlan, Phase
from moeless.costs.nonexpert import NonExpertCosts
from moeless.placement import Planner
from moeless.placement.setting import Setting
from moeless.placement.whole_model import spread_over_sources

#: Past positions of a token, for the time outside the experts (the trace's requests are about twice as long).
PAST_TOKENS = 800

#: How copies live. ``fixed``: placed once; ``ideal``: of each iteration's plan, there at once; ``resident``: loaded
#: when first planned and kept as long as planned; ``transient``: loaded for one layer of one iteration, then dropped.
Life = Literal["fixed", "ideal", "resident", "transient"]
#: A copy's layer, expert and GPU.
Key = tuple[int, int, int]
#: A layer's plan, given the iteration, the layer, the plan before, its copies' states and the seconds until it begins.
Plan = Callable[[int, int, LayerPlan | None, Any, float], LayerPlan]


def consecutive_rows(routing: Routing, regime: Regime, iterations: int) -> list[np.ndarray]:
    """Rows of consecutive iterations of the test requests.

    Prefill: requests one after the other, cut into chunks. Decode: as many requests as tokens, each one token further
    in every iteration, the next request taking the place of one that ends; they start at random positions.
    """
    rng = np.random.default_rng([SEED, 7, int(regime.phase), regime.tokens])
    if regime.phase == Phase.PREFILL:
        rows: list[np.ndarray] = []
        while sum(map(len, rows)) < iterations * regime.tokens:
            rows += [routing.request_rows(int(request)) for request in rng.permutation(routing.test)]
        flat = np.concatenate(rows)[: iterations * regime.tokens]
        return list(flat.reshape(iterations, regime.tokens))
    drawn = rng.choice(routing.test, regime.tokens)
    at, stop = routing.offsets[drawn].astype(np.int64), routing.offsets[drawn + 1]
    at += (rng.random(regime.tokens) * (stop - at)).astype(np.int64)
    found = []
    for _ in range(iterations):
        found.append(at.copy())
        at += 1
        ended = np.flatnonzero(at >= stop)
        fresh = rng.choice(routing.test, len(ended))
        at[ended], stop[ended] = routing.offsets[fresh], routing.offsets[fresh + 1]
    return found


def outside_seconds(costs: Any, regime: Regime) -> float:
    """Time of a layer outside its experts, every rank holding an equal part of the tokens."""
    gpus = costs.cluster.num_gpus
    mine = regime.tokens / gpus
    requests = mine if regime.phase == Phase.DECODE else max(mine / PAST_TOKENS, 1.0)
    sums_SX = np.tile([mine, mine * PAST_TOKENS, requests * PAST_TOKENS, 0.0], (gpus, 1))
    return NonExpertCosts(costs.spec, costs.cluster).seconds(sums_SX).per_moe_layer


Key = tuple[int, int, int]


@dataclass
class Held:
    """Copies (layer, expert, GPU) in memory or wanted there, one transfer at a time on each GPU's link.

    A copy takes memory from the moment its transfer begins until it is dropped; one that is dropped before that never
    begins.
    """

    expert_bytes: float
    load_seconds: float
    begun: dict[Key, float] = field(default_factory=dict)
    ready: dict[Key, float] = field(default_factory=dict)
    waiting: dict[Key, float] = field(default_factory=dict)
    free_G: dict[int, float] = field(default_factory=dict)
    byte_seconds: float = 0.0
    loaded: int = 0

    def keys(self, layer: int) -> set[Key]:
        """The layer's copies, on their way or there."""
        return {key for key in (*self.ready, *self.waiting) if key[0] == layer}

    def advance(self, now: float) -> None:
        """Begin the transfers that begin until ``now``, in the order in which they were asked for."""
        for key, asked in list(self.waiting.items()):
            begin = max(self.free_G.get(key[2], 0.0), asked)
            if begin <= now:
                del self.waiting[key]
                self.begun[key], self.ready[key] = begin, begin + self.load_seconds
                self.free_G[key[2]] = self.ready[key]
                self.loaded += 1

    def drop(self, key: Key, now: float) -> None:
        """Free the copy; a transfer that has begun ends first."""
        if self.waiting.pop(key, None) is None:
            self.byte_seconds += (max(now, self.ready.pop(key)) - self.begun.pop(key)) * self.expert_bytes


@dataclass(frozen=True)
class Replayed:
    """What a replay measured; ``late`` is the part of planned copies that had not come when their layer began."""

    time_IL: np.ndarray
    held_bytes: float
    loaded_bytes_per_second: float
    late: float


def replay(
    load_ILE: IntArray,
    planner: Planner,
    setting: Setting,
    plan: Plan,
    life: Life,
    load_seconds: float,
    outside: float,
    deployed_L: list[LayerPlan],
) -> Replayed:
    """Run the iterations' layers one after the other on the clock.

    A layer's plan is made as the layer before it begins, the first layer's as the iteration does; each GPU loads one
    copy at a time. Copies that are not there when their layer's experts begin do not serve in it. Dispatch decides from
    the true counts.
    """
    costs: Any = setting.costs
    gpus, layers = setting.cluster.num_gpus, load_ILE.shape[1]
    held = Held(float(setting.spec.expert_bytes), load_seconds if life in ("resident", "transient") else 0.0)
    plans: list[LayerPlan | None] = list(deployed_L) if life in ("fixed", "resident") else [None] * layers
    for layer, deployed in enumerate(deployed_L if life in ("fixed", "resident") else []):
        for key in _extras(layer, deployed):
            held.begun[key] = held.ready[key] = 0.0
    now, late, wanted = 0.0, 0, 0
    time_IL = np.empty(load_ILE.shape[:2])

    def decide(i: int, layer: int, lead: float) -> None:
        before = plans[layer]
        held.advance(now)
        made = plan(i, layer, before, _states(held, layer, before, now), lead)
        plans[layer] = made
        keep, had = set(_extras(layer, made)), held.keys(layer)
        for key in had - keep:
            held.drop(key, now)
        for key in sorted(keep - had):
            held.waiting[key] = now

    for i, load_LE in enumerate(load_ILE):
        if life == "ideal":
            for layer in range(layers):
                decide(i, layer, np.inf)
        elif life != "fixed":
            decide(i, 0, outside)
        for layer, load_E in enumerate(load_LE):
            if life in ("resident", "transient") and layer + 1 < layers:
                # this layer's own time is taken to be what it was in the iteration before
                decide(i, layer + 1, 2 * outside + (time_IL[i - 1, layer] if i else 0.0))
            now += outside
            held.advance(now)
            current = plans[layer]
            assert current is not None
            usable_R = _states(held, layer, current, now) == InstanceState.WARM
            wanted += current.num_extra
            late += int((~usable_R).sum())
            quota_SR = planner.dispatch(spread_over_sources(load_E, gpus), current, usable_R, setting)
            time_IL[i, layer] = pair_seconds(quota_SR.sum(0), current.gpu_R, costs)[0]
            if life == "transient":
                # what has not begun by now is of no more use
                for key in [key for key in held.waiting if key[0] == layer]:
                    held.drop(key, now)
            now += time_IL[i, layer]
            if life == "transient":
                for key in held.keys(layer):
                    held.drop(key, now)
                plans[layer] = None
    for key in [key for layer in range(layers) for key in held.keys(layer)]:
        held.drop(key, now)
    moved = held.loaded * held.expert_bytes / now
    return Replayed(time_IL, held.byte_seconds / now, moved, late / max(wanted, 1))


def _extras(layer: int, plan: LayerPlan) -> list[Key]:
    extra = ~plan.primary_R
    return [(layer, e, g) for e, g in zip(plan.expert_R[extra].tolist(), plan.gpu_R[extra].tolist(), strict=True)]


def _states(held: Held, layer: int, plan: LayerPlan | None, now: float) -> Any:
    """Each copy's state; primaries are always there."""
    if plan is None:
        return None
    state_R = np.full(plan.R, InstanceState.WARM, np.uint8)
    for r in np.flatnonzero(~plan.primary_R):
        key = layer, int(plan.expert_R[r]), int(plan.gpu_R[r])
        if held.ready.get(key, np.inf) > now:
            state_R[r] = InstanceState.LOADING
    return state_R
