"""What every cost model answers, and the one place where a layer's time is composed.

Axes: R replicas of the plan, G GPUs, S source ranks (rank s is GPU s).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moeless.cluster import Cluster
from moeless.contracts import FloatArray, IntArray, LayerPlan
from moeless.spec import MoESpec

if TYPE_CHECKING:
    # profiles are written on machines without numba, which the kernels need
    from moeless.costs.kernels import KernelTerms


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer, by part; ``total`` is their sum."""

    expert: float
    all_to_all: float
    misc: float
    control: float

    @property
    def total(self) -> float:
        """Seconds from the gate's output to the combined hidden states."""
        return self.expert + self.all_to_all + self.misc + self.control


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

    def kernel_terms(self) -> KernelTerms | None:
        """The whole of :meth:`layer_seconds` as numbers for compiled code; None where it is more than that."""
        return None

    @abstractmethod
    def expert_seconds(self, tokens_R: IntArray, plan: LayerPlan) -> FloatArray:
        """Compute time of each GPU, ``[G]``, for ``tokens_R`` tokens on each replica; unused ones are free."""

    @abstractmethod
    def all_to_all_seconds(self, bytes_SG: FloatArray) -> float:
        """Both directions of the layer's exchange, for bytes from source rank to GPU, ``[S, G]``."""

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

    def misc_seconds(self) -> float:
        """Fixed time of a layer outside expert compute and exchange (T_misc of the paper)."""
        return 0.0

    def layer_seconds(self, quota_SR: IntArray, plan: LayerPlan, control: float = 0.0) -> LayerTime:
        """Time of one layer whose tokens go to replicas by ``quota_SR``, ``[S, R]`` tokens."""
        expert_G = self.expert_seconds(quota_SR.sum(0), plan)
        bytes_SG = np.zeros((quota_SR.shape[0], self.cluster.num_gpus))
        np.add.at(bytes_SG.T, plan.gpu_R, quota_SR.T * float(self.spec.token_bytes))
        return LayerTime(
            expert=float(expert_G.max(initial=0.0)),
            all_to_all=self.all_to_all_seconds(bytes_SG),
            misc=self.misc_seconds(),
            control=control,
        )
