"""Physical costs by roofline: an expert's weights are read once, its tokens cost FLOPs.

Per used replica ``max(tokens * FLOPs / peak, weight bytes / bandwidth)``; a GPU computes its replicas
one after the other, plus one launch; tokens travel by the alpha-beta model of ``links``.
"""

from __future__ import annotations

import numpy as np

from moeless.cluster import Cluster
from moeless.costs import links
from moeless.costs.base import Control, CostModel, CostTerms
from moeless.costs.layer_time import LayerCosts, no_tables
from moeless.spec import MoESpec

#: Exposed control time of a layer, seconds, where the ranks decide after the gate: gathering their counts, and the
#: dispatch kernel. Planning ahead is off the critical path.
GATHER_SECONDS = 12e-6
DISPATCH_SECONDS = 8e-6
#: From a gate's input to the plan of a layer ahead, on its own stream and a CPU thread: one small matrix product and
#: a copy to the host, then a compiled planner. The paper states under 200 microseconds for the forecast alone.
FORECAST_SECONDS = 30e-6
PLAN_SECONDS = 20e-6


class RooflineCosts(CostModel):
    """Weight-read floor and FLOP slope, summed over a GPU's replicas.

    Args:
        charge_control: False leaves control time out (the algorithm alone).
    """

    name = "roofline"

    def __init__(self, spec: MoESpec, cluster: Cluster, charge_control: bool = True) -> None:
        super().__init__(spec, cluster)
        self.charge_control = charge_control
        self.token_seconds = spec.expert_flops / cluster.device.flops
        self.floor_seconds = spec.expert_bytes / cluster.device.memory_bandwidth

    def terms(self) -> CostTerms:
        cluster = self.cluster
        link = cluster.slow if cluster.num_gpus > cluster.island_size else cluster.fast
        single = cluster.num_gpus == 1
        return CostTerms(
            token_seconds=self.token_seconds,
            floor_seconds=self.floor_seconds,
            launch_seconds=cluster.device.launch_seconds,
            link_seconds=0.0 if single else self.spec.token_bytes / link.bandwidth,
            latency_seconds=0.0 if single else link.latency,
            reduce_max=False,
        )

    def make_layer_costs(self) -> LayerCosts:
        cluster = self.cluster
        return LayerCosts(
            token_seconds=self.token_seconds,
            floor_seconds=self.floor_seconds,
            launch_seconds=cluster.device.launch_seconds,
            reduce_max=False,
            token_bytes=float(self.spec.token_bytes),
            local_is_free=True,
            island_size=cluster.island_size,
            island_G=np.arange(cluster.num_gpus) // cluster.island_size,
            fast_bytes_per_second=cluster.fast.bandwidth,
            fast_latency=cluster.fast.latency,
            slow_bytes_per_second=cluster.slow.bandwidth,
            slow_latency=cluster.slow.latency,
            misc_seconds=0.0,
            tables=no_tables(),
        )

    def load_seconds(self, num_bytes: float, source_tier: str, gpu: int) -> float:
        return links.transfer_seconds(self.cluster, num_bytes, source_tier)

    def control_seconds(self, control: Control, layer: int) -> float:
        return GATHER_SECONDS + DISPATCH_SECONDS if self.charge_control and control.gathers_counts else 0.0

    def background_seconds(self, control: Control) -> float:
        return FORECAST_SECONDS + PLAN_SECONDS if self.charge_control and control.plans_ahead else 0.0
