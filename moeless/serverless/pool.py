"""The expert copies of a cluster: loading, warm, idle, evicted.

Glossary: a copy is *cold* when it is in no GPU memory, *loading* from the moment its transfer is asked for until it
is ready, *warm* from then on, *expired* once its keep-alive has run out and its memory is free again. A copy that
the layer's current plan holds never expires. Copies of one expert on one GPU share their weights: they are one
copy here, however many replicas of it a plan names.

Axes: L layers, E experts, G GPUs, R replicas of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeless.cluster import Cluster
from moeless.contracts import BoolArray, FloatArray, InstanceState, Int32Array, LayerPlan
from moeless.costs import CostModel
from moeless.errors import RunFailed, UserError
from moeless.serverless import kernels
from moeless.spec import MoESpec

#: Where a copy's weights may come from besides another GPU.
HOME_TIERS = ("host", "storage")


@dataclass(frozen=True)
class PoolSettings:
    """Assumptions about instances; the paper states none of the durations.

    Attributes:
        keep_alive_seconds: how long an unplanned copy stays in memory after its last use.
        home: where every expert's weights always are: ``host`` memory or object ``storage``.
        instant: copies take no time and no link (the paper's cost formula).
        expert_bytes_G: memory for expert copies on each GPU; None: what the model's other weights and
            ``kv_fraction`` leave.
        kv_fraction: share of a GPU's memory, after the non-expert weights, that is kept for the KV cache.
    """

    keep_alive_seconds: float = 10.0
    home: str = "host"
    instant: bool = False
    expert_bytes_G: tuple[float, ...] | None = None
    kv_fraction: float = 0.3

    def __post_init__(self) -> None:
        if self.keep_alive_seconds < 0:
            raise UserError("the keep-alive must not be negative")
        if self.home not in HOME_TIERS:
            raise UserError(f"experts' home is {self.home!r}, it must be host or storage")
        if not 0 <= self.kv_fraction < 1:
            raise UserError("the KV cache's share of memory must be at least 0 and below 1")


class InstancePool:
    """State and accounts of every copy. Times are seconds and must not go backwards."""

    def __init__(self, spec: MoESpec, cluster: Cluster, costs: CostModel, settings: PoolSettings) -> None:
        self.spec, self.cluster, self.settings = spec, cluster, settings
        shape = (spec.L, spec.E, cluster.G)
        self.ready_LEG = np.full(shape, np.inf)
        self.born_LEG = np.full(shape, np.inf)
        self.used_LEG = np.zeros(shape)
        self.planned_LEG = np.zeros(shape, np.bool_)
        self.engine_free_G = np.zeros(cluster.G)
        self.resident_G = np.zeros(cluster.G)
        self.capacity_G = self._capacity()
        self._counters = np.zeros(kernels.NUM_COUNTERS)
        tiers = ("peer", "peer-slow", settings.home)
        bytes_ = float(spec.expert_bytes)
        seconds = [0.0 if settings.instant else costs.load_seconds(bytes_, tier, 0) for tier in tiers]
        self.tier_seconds = np.array(seconds)

    def _capacity(self) -> FloatArray:
        settings, cluster = self.settings, self.cluster
        if settings.expert_bytes_G is not None:
            if len(settings.expert_bytes_G) != cluster.G:
                raise UserError(f"expert memory is given for {len(settings.expert_bytes_G)} GPUs, not {cluster.G}")
            return np.array(settings.expert_bytes_G, np.float64)
        room = cluster.device.memory_bytes - self.spec.non_expert_bytes
        return np.full(cluster.G, max(0.0, room * (1.0 - settings.kv_fraction)))

    @property
    def moved_bytes(self) -> float:
        """Weight bytes loaded since the deployment."""
        return float(self._counters[kernels.LOADS] * self.spec.expert_bytes)

    @property
    def evictions(self) -> int:
        """Copies that left memory."""
        return int(self._counters[kernels.EVICTIONS])

    @property
    def refused(self) -> int:
        """Copies that a plan wanted and memory had no room for."""
        return int(self._counters[kernels.REFUSED])

    def loads_by_tier(self) -> dict[str, int]:
        """Loads since the deployment by where the weights came from."""
        names = ("peer", "peer-slow", self.settings.home)
        return {name: int(self._counters[kernels.BY_TIER + i]) for i, name in enumerate(names)}

    def deploy(self, plans: Sequence[LayerPlan], now: float) -> None:
        """Put the first plans in memory, warm at ``now``; their loading is part of the deployment, not of the run.

        Raises:
            RunFailed: the copies do not fit in the GPUs' memory.
        """
        for layer, plan in enumerate(plans):
            self.ready_LEG[layer, plan.expert_R, plan.gpu_R] = now
            self.born_LEG[layer, plan.expert_R, plan.gpu_R] = now
            self.used_LEG[layer, plan.expert_R, plan.gpu_R] = now
            self.planned_LEG[layer, plan.expert_R, plan.gpu_R] = True
        self.resident_G[:] = np.isfinite(self.born_LEG).sum((0, 1)) * float(self.spec.expert_bytes)
        over = np.flatnonzero(self.resident_G > self.capacity_G)
        if len(over):
            need, room = self.resident_G[over[0]] / 1e9, self.capacity_G[over[0]] / 1e9
            raise RunFailed(
                f"the experts of {self.spec.name} need {need:.1f} GB on GPU {over[0]} of {self.cluster.name}, "
                f"which has {room:.1f} GB for them; use more GPUs or fewer extra slots"
            )

    def provision(self, layer: int, expert_R: Int32Array, gpu_R: Int32Array, now: float) -> None:
        """Make these replicas the layer's plan: start loading what is missing, let what is left out grow old."""
        kernels.provision(
            layer,
            expert_R,
            gpu_R,
            now,
            float(self.spec.expert_bytes),
            self.settings.keep_alive_seconds,
            self.cluster.island_size,
            self.tier_seconds,
            self.settings.instant,
            self.ready_LEG,
            self.born_LEG,
            self.used_LEG,
            self.planned_LEG,
            self.engine_free_G,
            self.resident_G,
            self.capacity_G,
            self._counters,
        )

    def usable(self, plan: LayerPlan, now: float) -> BoolArray:
        """Which replicas of a plan are warm at ``now``, ``[R]``."""
        return np.asarray(self.ready_LEG[plan.layer, plan.expert_R, plan.gpu_R] <= now)

    def ready_at(self, plan: LayerPlan) -> FloatArray:
        """When each replica of a plan is warm, ``[R]``; infinite where nothing loads it."""
        return np.asarray(self.ready_LEG[plan.layer, plan.expert_R, plan.gpu_R])

    def states(self, plan: LayerPlan, now: float) -> NDArray[np.uint8]:
        """An :class:`InstanceState` per replica, ``[R]``."""
        ready = self.ready_at(plan)
        state = np.full(plan.R, InstanceState.COLD, np.uint8)
        state[np.isfinite(ready)] = InstanceState.LOADING
        state[ready <= now] = InstanceState.WARM
        return state

    def resident_byte_seconds(self, now: float) -> float:
        """Sum over copies of bytes times seconds in memory up to ``now``, copies still there included.

        An unplanned copy counts to the end of its keep-alive, even where nobody has looked at it since.
        """
        here = np.isfinite(self.born_LEG)
        until = np.full(self.born_LEG.shape, now)
        ends = np.maximum(self.used_LEG, self.born_LEG) + self.settings.keep_alive_seconds
        until[~self.planned_LEG] = np.minimum(ends[~self.planned_LEG], now)
        alive = float((until[here] - self.born_LEG[here]).sum()) * float(self.spec.expert_bytes)
        return float(self._counters[kernels.RESIDENT]) + alive
