"""What every cost model answers.

A layer's time is made up in ``layer_time``, of the numbers that a cost model gives.
Axes: R replicas of the plan, G GPUs, S source ranks (rank s is GPU s).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moeless.cluster import Cluster
from moeless.contracts import FloatArray, IntArray, LayerPlan
from moeless.spec import MoESpec

if TYPE_CHECKING:
    # profiles are written on machines without numba, which compiled functions need
    from moeless.costs.layer_time import LayerCosts, LayerTime


@dataclass(frozen=True)
class Control:
    """What a planner's decisions take while requests are served, for cost models to charge.

    Attributes:
        gathers_counts: after a layer's gate the ranks gather their token counts and decide which copies serve.
        plans_ahead: loads are forecast and layers planned beside the model, iteration by iteration.
        dispatch_timed_as, planning_timed_as: the entries of a hardware profile's ``control`` that hold the measured
            times of that decision and of planning a layer; empty if there are none.
    """

    gathers_counts: bool = False
    plans_ahead: bool = False
    dispatch_timed_as: str = ""
    planning_timed_as: str = ""


@dataclass(frozen=True)
class CostTerms:
    """The cost model as numbers that compiled planners and dispatchers take.

    A used replica with n tokens takes ``max(token_seconds * n, floor_seconds)``; a GPU's time is the
    sum over its used replicas (the maximum where ``reduce_max``) plus ``launch_seconds`` if it has
    any; the all-to-all takes ``2 * (link_seconds * tokens of the fullest GPU + latency)``.
    Exact for ``paper`` and ``roofline`` within one link tier, an approximation for other models,
    whose users check the final answer with :meth:`CostModel.layer_seconds`.
    """

    token_seconds: float
    floor_seconds: float
    launch_seconds: float
    link_seconds: float
    latency_seconds: float
    reduce_max: bool


class CostModel(ABC):
    """Times of one (model, cluster) pair. All results are seconds."""

    name: ClassVar[str]

    def __init__(self, spec: MoESpec, cluster: Cluster) -> None:
        self.spec = spec
        self.cluster = cluster

    @abstractmethod
    def terms(self) -> CostTerms:
        """The model's numbers for kernels."""

    @cached_property
    def layer_costs(self) -> LayerCosts:
        """The model's numbers for :mod:`moeless.costs.layer_time`, made once."""
        return self.make_layer_costs()

    @abstractmethod
    def make_layer_costs(self) -> LayerCosts:
        """All that a layer's time depends on."""

    @property
    def is_lines(self) -> bool:
        """Whether :meth:`terms` say all that :attr:`layer_costs` do about compute and exchange within one link tier."""
        return len(self.layer_costs.tables.tokens_N) == 0

    def expert_seconds(self, tokens_R: IntArray, plan: LayerPlan) -> FloatArray:
        """Compute time of each GPU, ``[G]``, for ``tokens_R`` tokens on each replica; unused ones are free."""
        from moeless.costs.layer_time import gpu_seconds, work_size

        seconds_G = np.zeros(self.cluster.num_gpus)
        work_W = np.empty(work_size(plan.R, len(seconds_G)), np.int64)
        gpu_seconds(np.ascontiguousarray(tokens_R, np.int64), plan.gpu_R, self.layer_costs, seconds_G, work_W)
        return seconds_G

    def all_to_all_seconds(self, bytes_SG: FloatArray) -> float:
        """Both directions of the layer's exchange, for bytes from source rank to GPU, ``[S, G]``."""
        from moeless.costs.layer_time import (
            GOT_FAST,
            LOAD,
            NUM_TRAFFIC,
            SENT,
            SENT_FAST,
            exchange_load,
            exchange_seconds,
        )

        tokens_SG = np.asarray(bytes_SG, np.float64) / self.spec.token_bytes
        traffic_QG = np.zeros((NUM_TRAFFIC, self.cluster.num_gpus))
        traffic_QG[LOAD], traffic_QG[SENT] = tokens_SG.sum(0), tokens_SG.sum(1)
        island_G, away_SG = self.layer_costs.island_G, tokens_SG * ~np.eye(len(tokens_SG), dtype=bool)
        near_GG = island_G[:, None] == island_G[None]
        for tier, pairs_GG in enumerate((near_GG, ~near_GG)):
            traffic_QG[SENT_FAST + tier] = (away_SG * pairs_GG).sum(1)
            traffic_QG[GOT_FAST + tier] = (away_SG * pairs_GG).sum(0)
        return float(exchange_seconds(exchange_load(traffic_QG), self.layer_costs))

    @abstractmethod
    def load_seconds(self, num_bytes: float, source_tier: str, gpu: int) -> float:
        """Bringing weights to a GPU from ``local``, ``peer``, ``host`` or ``storage``."""

    @abstractmethod
    def control_seconds(self, control: Control, layer: int) -> float:
        """Gathering counts and deciding the dispatch of one layer, after its gate; 0 for planners that do neither."""

    def background_seconds(self, control: Control) -> float:
        """From a layer's gate input to the plan of the layer ahead: forecast, its copy to the host, planning.

        It runs beside the model and is exposed only where the layer ahead starts sooner.
        """
        return 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What lies outside the model's grounds so far (extrapolation, say), one sentence each."""
        return ()

    def layer_seconds(self, quota_SR: IntArray, plan: LayerPlan, control: float = 0.0) -> LayerTime:
        """Time of one layer whose tokens go to replicas by ``quota_SR``, ``[S, R]`` tokens."""
        from moeless.costs.layer_time import NUM_TRAFFIC, layer_parts, quota_seconds

        traffic_QG = np.empty((NUM_TRAFFIC, self.cluster.num_gpus))
        quota = np.ascontiguousarray(quota_SR, np.int64)
        expert, exchange, _ = quota_seconds(quota, plan.gpu_R, self.layer_costs, traffic_QG)
        parts: LayerTime = layer_parts(expert, exchange, control, 0.0, self.layer_costs)
        return parts
