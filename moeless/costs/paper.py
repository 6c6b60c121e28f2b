"""The paper's linear costs (arXiv 2603.06350, section on the formulation).

``T = max over replicas of alpha * tokens + 2 * max over GPUs of beta * tokens + T_misc``. The
paper states neither constant; the defaults are the device's time for one token in one expert and
the slow link's time for one token's hidden state. Control and copies that hide are free.
"""

from __future__ import annotations

import numpy as np

from moeless.cluster import Cluster
from moeless.costs.base import Control, CostModel, CostTerms
from moeless.costs.layer_time import LayerCosts, no_tables
from moeless.costs.links import transfer_seconds
from moeless.spec import MoESpec


class PaperCosts(CostModel):
    """Linear expert time, maximum over replicas.

    Args:
        alpha: seconds per token in a replica; None derives it from FLOPs over peak.
        beta: seconds per token exchanged by a GPU, one direction; None derives it from the links.
        misc: seconds of a layer outside experts and exchange (T_misc).
    """

    name = "paper"

    def __init__(
        self,
        spec: MoESpec,
        cluster: Cluster,
        alpha: float | None = None,
        beta: float | None = None,
        misc: float = 0.0,
    ) -> None:
        super().__init__(spec, cluster)
        link = cluster.slow if cluster.num_gpus > cluster.island_size else cluster.fast
        self.alpha = spec.expert_flops / cluster.device.flops if alpha is None else alpha
        self.beta = spec.token_bytes / link.bandwidth if beta is None else beta
        self.misc = misc

    def terms(self) -> CostTerms:
        return CostTerms(self.alpha, 0.0, 0.0, self.beta, 0.0, reduce_max=True)

    def make_layer_costs(self) -> LayerCosts:
        # beta is seconds per token: one "byte" per token, 1/beta tokens a second
        speed = 1.0 / self.beta if self.beta else np.inf
        return LayerCosts(
            self.alpha, 0.0, 0.0, True, 1.0, False, 1, np.arange(self.cluster.num_gpus), speed, 0.0, speed, 0.0,
            float(self.misc), no_tables(),
        )  # fmt: skip

    def load_seconds(self, num_bytes: float, source_tier: str, gpu: int) -> float:
        return transfer_seconds(self.cluster, num_bytes, source_tier)

    def control_seconds(self, control: Control, layer: int) -> float:
        return 0.0
