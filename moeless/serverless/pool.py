"""The expert copies of a cluster: loading, warm, idle, evicted.

Glossary: a copy is *cold* when it is in no GPU memory, *loading* from the moment its transfer is asked for until it
is ready, *warm* from then on, *expired* once its keep-alive has run out and its memory is free again. A copy that
the layer's current plan holds does not expire while requests run. Copies of one expert on one GPU share their
weights: they are one copy here, however many replicas of it a plan names.

Axes: L layers, E experts, G GPUs, R replicas of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moeless.cluster import Cluster
from moeless.contracts import BoolArray, FloatArray, InstanceState, Int32Array, LayerPlan
from moeless.costs import CostModel
from moeless.errors import RunFailed, UserError
from moeless.serverless import kernels
from moeless.serverless.keep_alive import NUM_BINS, KeepAlive
from moeless.serverless.options import Serverless
from moeless.spec import MoESpec

#: Where a copy's weights may come from besides another GPU.
HOME_TIERS = ("host", "storage")


@dataclass(frozen=True)
class PoolSettings(Serverless):
    """Assumptions about instances, beside the options.

    Attributes:
        keep_alive: of copies that no plan holds.
        instant: copies take no time and no link (the paper's cost formula).
        expert_bytes_G: memory for expert copies on each GPU; None: what the model's other weights and the KV cache
            of the running requests leave, moment by moment.
    """

    keep_alive: KeepAlive = field(default_factory=KeepAlive)
    instant: bool = False
    expert_bytes_G: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.home not in HOME_TIERS:
            raise UserError(f"experts' home is {self.home!r}, it must be host or storage")
        if self.requests_per_gpu is not None and not 0 < self.requests_per_gpu < math.inf:
            raise UserError(f"the requests that a GPU is held for must be above 0, got {self.requests_per_gpu}")
        if not 0 <= self.container_seconds < math.inf:
            raise UserError(f"a container's start must take at least 0 seconds, and end, got {self.container_seconds}")
        if not 0 <= self.start_seconds < math.inf:
            raise UserError(f"an instance's start must take at least 0 seconds, and end, got {self.start_seconds}")


class InstancePool:
    """State and accounts of every copy. Times are seconds and must not go backwards."""

    def __init__(self, spec: MoESpec, cluster: Cluster, costs: CostModel, settings: PoolSettings) -> None:
        self.spec, self.cluster, self.settings = spec, cluster, settings
        self._bytes = float(spec.expert_bytes)
        shape = (spec.L, spec.E, cluster.G)
        self.ready_LEG = np.full(shape, np.inf)
        self.born_LEG = np.full(shape, np.inf)
        # -1: never used
        self.used_LEG = np.full(shape, -1.0)
        self.planned_LEG = np.zeros(shape, np.bool_)
        self.engine_free_G = np.zeros(cluster.G)
        self.resident_G = np.zeros(cluster.G)
        self.down_G = np.zeros(cluster.G, np.bool_)
        self.kv_overflow_bytes = 0.0
        self.room_G = self._room()
        self.capacity_G = self.room_G.copy()
        self._counters = np.zeros(kernels.NUM_COUNTERS)
        keep = settings.keep_alive
        self._keep_LE = np.full(shape[:2], np.inf if keep.kind == "lru" else keep.seconds)
        self._histogram_LEB = np.zeros((*shape[:2], NUM_BINS) if keep.kind == "adaptive" else (0, 0, 0), np.int64)
        tiers = ("peer", "peer-slow", settings.home)
        seconds = [0.0 if settings.instant else costs.load_seconds(self._bytes, tier, 0) for tier in tiers]
        self.tier_seconds = np.array(seconds)
        #: loading the weights outside the experts
        self.restart_seconds = costs.load_seconds(float(spec.non_expert_bytes), settings.home, 0)
        self.wake_seconds = settings.container_seconds + self.restart_seconds
        self.held_G = np.ones(cluster.G, np.bool_)
        # since when each GPU is held, or is not, and how long it was either before
        self._changed_G, self._held_seconds_G, self._released_seconds_G = np.zeros((3, cluster.G))
        self._on_copy: Callable[[int, int, int, float, float], None] | None = None

    def _room(self) -> FloatArray:
        given = self.settings.expert_bytes_G
        if given is not None:
            if len(given) != self.cluster.G:
                raise UserError(f"expert memory is given for {len(given)} GPUs, not {self.cluster.G}")
            return np.array(given, np.float64)
        room = self.cluster.device.memory_bytes - self.spec.non_expert_bytes
        return np.full(self.cluster.G, max(0.0, room))

    @property
    def moved_bytes(self) -> float:
        """Weight bytes loaded since the deployment."""
        return float(self._counters[kernels.LOADS] * self._bytes)

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
            for array in (self.ready_LEG, self.born_LEG, self.used_LEG):
                array[layer, plan.expert_R, plan.gpu_R] = now
            self.planned_LEG[layer, plan.expert_R, plan.gpu_R] = True
        self.resident_G[:] = np.isfinite(self.born_LEG).sum((0, 1)) * self._bytes
        over = np.flatnonzero(self.resident_G > self.capacity_G)
        if len(over):
            need, room = self.resident_G[over[0]] / 1e9, self.capacity_G[over[0]] / 1e9
            raise RunFailed(
                f"the experts of {self.spec.name} need {need:.1f} GB on GPU {over[0]} of {self.cluster.name}, "
                f"which has {room:.1f} GB for them; use more GPUs or fewer extra slots"
            )

    @property
    def on_copy(self) -> Callable[[int, int, int, float, float], None] | None:
        """Told of every transfer: GPU, layer, expert, begin, end."""
        return self._on_copy

    @on_copy.setter
    def on_copy(self, told: Callable[[int, int, int, float, float], None] | None) -> None:
        self._on_copy = told
        self.__dict__.pop("state", None)

    @cached_property
    def state(self) -> kernels.PoolState:
        """The pool for compiled code."""
        settings = self.settings
        room = 0 if self._on_copy is None else self.born_LEG.size
        return kernels.PoolState(
            self._bytes, float(settings.keep_alive.seconds), settings.keep_alive.kind == "adaptive", self._keep_LE,
            self._histogram_LEB, self.cluster.island_size, self.tier_seconds, float(settings.start_seconds),
            bool(settings.instant), self.ready_LEG, self.born_LEG, self.used_LEG, self.planned_LEG, self.engine_free_G,
            self.resident_G, self.capacity_G, self._counters, np.zeros(self.born_LEG.shape[1:], np.bool_),
            np.empty((room, 5)),
        )  # fmt: skip

    def provision(self, layer: int, expert_R: Int32Array, gpu_R: Int32Array, now: float) -> None:
        """Make these replicas the layer's plan: start loading what is missing, let what is left out grow old."""
        kernels.provision(layer, expert_R, gpu_R, now, self.state)
        self.tell_copies()

    def tell_copies(self) -> None:
        """Tell of the transfers that compiled code has begun since the last time."""
        if self._on_copy is None:
            return
        for gpu, layer, expert, begin, end in self.state.log_X5[: int(self._counters[kernels.LOGGED])].tolist():
            self._on_copy(int(gpu), int(layer), int(expert), begin, end)
        self._counters[kernels.LOGGED] = 0

    def expire(self, layer: int, now: float) -> None:
        """Free what lingers beside a layer's plan for longer than its keep-alive."""
        kernels.expire(layer, now, self.state)

    def ready_at(self, plan: LayerPlan) -> FloatArray:
        """When each replica of a plan is warm, ``[R]``; infinite where nothing loads it."""
        return np.asarray(self.ready_LEG[plan.layer, plan.expert_R, plan.gpu_R])

    def usable(self, plan: LayerPlan, now: float) -> BoolArray:
        """Which replicas of a plan are warm at ``now``, ``[R]``."""
        return np.asarray(self.ready_at(plan) <= now)

    def states(self, plan: LayerPlan, now: float) -> NDArray[np.uint8]:
        """An :class:`InstanceState` per replica, ``[R]``."""
        ready = self.ready_at(plan)
        state = np.full(plan.R, InstanceState.COLD, np.uint8)
        state[np.isfinite(ready)] = InstanceState.LOADING
        state[ready <= now] = InstanceState.WARM
        return state

    def alive(self, plan: LayerPlan) -> LayerPlan:
        """The plan with the copies that linger beside it as further extras: what a planner may reuse warm."""
        place = np.flatnonzero(np.less(self.born_LEG[plan.layer], np.inf) > self.planned_LEG[plan.layer])
        if not len(place):
            return plan
        expert, gpu = np.divmod(place, self.cluster.G)
        expert_R = np.concatenate([plan.expert_R, expert.astype(np.int32)])
        gpu_R = np.concatenate([plan.gpu_R, gpu.astype(np.int32)])
        primary_R = np.concatenate([plan.primary_R, np.zeros(len(expert), np.bool_)])
        order = np.lexsort((expert_R, ~primary_R, gpu_R))
        share_R = plan.share_R
        if share_R is not None:
            share_R = np.concatenate([share_R, np.zeros(len(expert))])[order]
        return LayerPlan(plan.layer, expert_R[order], gpu_R[order], primary_R[order], share_R)

    def share_memory(self, kv_bytes_G: FloatArray, now: float) -> None:
        """Give the KV cache its room: unplanned copies that are in its way are evicted, least recently used first.

        Where even that is not enough the overflow is noted; a real system would preempt requests.
        """
        if self.settings.expert_bytes_G is not None:
            return
        self.capacity_G[:] = np.where(self.down_G, 0.0, np.maximum(0.0, self.room_G - kv_bytes_G))
        over_G = self.resident_G > self.capacity_G
        for gpu in np.flatnonzero(over_G).tolist() if np.count_nonzero(over_G) else ():
            self._make_room(gpu, now)
            over = float(self.resident_G[gpu] - self.capacity_G[gpu])
            self.kv_overflow_bytes = max(self.kv_overflow_bytes, over)

    def firm_G(self, now: float) -> FloatArray:
        """Bytes of the copies that :meth:`shed` cannot evict, ``[G]``: a plan's, and those on their way."""
        firm_LEG = np.isfinite(self.born_LEG) & (self.planned_LEG | (self.ready_LEG > now))
        return np.asarray(firm_LEG.sum((0, 1)) * self._bytes)

    def shed(self, gpu: int, num_bytes: float, now: float) -> None:
        """Evict a GPU's unplanned copies, least recently used first, until that frees so much, or none is left."""
        self._make_room(gpu, now, float(self.capacity_G[gpu] - self.resident_G[gpu]) + num_bytes)

    def _make_room(self, gpu: int, now: float, wanted: float = 0.0) -> None:
        kernels.make_room(gpu, wanted, now, self.state)

    def bytes_of(self, plans: Sequence[LayerPlan]) -> FloatArray:
        """What the plans' copies take on each GPU, ``[G]``."""
        copies_LEG = np.zeros(self.born_LEG.shape, np.bool_)
        for plan in plans:
            copies_LEG[plan.layer, plan.expert_R, plan.gpu_R] = True
        return np.asarray(copies_LEG.sum((0, 1)) * self._bytes)

    def set_down(self, gpu: int, down: bool) -> None:
        """Take a GPU's memory away, or give it back empty."""
        self.down_G[gpu] = down
        self.capacity_G[gpu] = 0.0 if down else self.room_G[gpu]

    def drop(self, copies_LEG: BoolArray, end: float) -> None:
        """Take copies out of memory as of ``end``, planned or not (expiry, failure)."""
        for layer, expert, gpu in np.argwhere(copies_LEG & np.isfinite(self.born_LEG)).tolist():
            kernels.evict(layer, expert, gpu, end, self.state)

    @property
    def gives_back(self) -> bool:
        """Whether GPUs are given back after an idle keep-alive."""
        return self.settings.scale_to_zero and self.settings.keep_alive.kind != "lru"

    def sleep(self, idle_from: float, until: float) -> bool:
        """An idle gap: where it outlasts the keep-alive, everything expires and the GPUs are given back.

        Returns:
            Whether that happened; the caller then waits ``wake_seconds`` and provisions its plans again.
        """
        keep = self.settings.keep_alive
        if not self.gives_back or until - idle_from <= keep.seconds:
            return False
        end = idle_from + keep.seconds
        self.drop(np.ones(self.born_LEG.shape, np.bool_), end)
        self.hold(np.zeros(self.cluster.G, np.bool_), end)
        if self.settings.requests_per_gpu is None:
            self.hold(np.ones(self.cluster.G, np.bool_), until)
        self.engine_free_G[:] = until + self.wake_seconds
        return True

    def hold(self, held_G: BoolArray, now: float) -> None:
        """Hold these GPUs from ``now`` on, and no others."""
        seconds_G = now - self._changed_G
        assert (seconds_G >= 0).all(), "a GPU was given back or taken before it last was"
        self._held_seconds_G[self.held_G] += seconds_G[self.held_G]
        self._released_seconds_G[~self.held_G] += seconds_G[~self.held_G]
        self.held_G, self._changed_G = held_G.copy(), np.full(self.cluster.G, now)

    def gpu_seconds(self, now: float) -> float:
        """Sum over GPUs of the seconds for which they were held, up to ``now``."""
        self.hold(self.held_G, now)
        return self.cluster.G * now - float(self._released_seconds_G.sum())

    def resident_byte_seconds(self, now: float) -> float:
        """Sum over copies of bytes times seconds in memory up to ``now``, copies still there included.

        An unplanned copy counts to the end of its keep-alive, even where nobody has looked at it since.
        """
        here = np.isfinite(self.born_LEG)
        ends = np.maximum(self.used_LEG, np.where(here, self.ready_LEG, 0.0)) + self._keep_LE[:, :, None]
        until = np.where(self.planned_LEG, now, np.minimum(ends, now))
        alive = float(np.maximum(0.0, until[here] - self.born_LEG[here]).sum()) * self._bytes
        return float(self._counters[kernels.RESIDENT]) + alive

    def check(self) -> None:
        """Assert that memory is conserved.

        Raises:
            AssertionError: the bytes booked differ from the copies there are, or exceed what the GPU has.
        """
        held = np.isfinite(self.born_LEG).sum((0, 1)) * self._bytes
        assert np.allclose(held, self.resident_G), "booked memory differs from the copies there are"
        assert (np.isfinite(self.ready_LEG) == np.isfinite(self.born_LEG)).all(), "a copy is ready that was never begun"
        seconds_G = self._held_seconds_G + self._released_seconds_G
        assert np.allclose(seconds_G, self._changed_G), "a GPU was held and given back at once, or neither"
        here = np.isfinite(self.born_LEG)
        assert not here[:, :, ~self.held_G].any(), "a copy is in the memory of a GPU that was given back"
        assert (self.ready_LEG[here] >= self.born_LEG[here]).all(), "a copy was ready before its load began"
