"""The three bills of a run: what each counts, whom it flatters.

With d_il the duration of layer l in iteration i (stalls included), M_e the bytes of one expert, R_il its live
replicas, T the run's wall-clock span from first arrival to last completion:

- **paper**: ``C = sum_i sum_l d_il * R_il * M_e + sum_i misc_i * M_misc`` (arXiv 2603.06350, the cost formula).
  An expert is billed only while its own layer runs. It flatters elastic systems: weights that wait in GPU memory
  for their layer's next turn, keep-alive and idle time between requests are free, and so is the GPU around them.
  Serverful systems billed by it look cheap too: their memory is billed for one layer's share of the time.
- **resident**: ``sum over copies of M_e * seconds in GPU memory``, from the start of its load to its eviction,
  used or not, idle time included. It flatters nobody in memory, yet charges nothing for GPUs that hold no copy,
  so it assumes that freed memory can be sold to somebody else.
- **paper, whole model** (``paper_whole``): ``sum_i sum_l d_il * sum_l' R_il' * M_e``: every layer's live copies for
  as long as any layer runs. It is what a serverful system really holds while it works, if idle time is free. The
  paper does not say by which rule it bills its baselines; comparing an elastic system's ``paper`` bill with a
  serverful one's ``paper_whole`` is the comparison most favourable to serverless.
- **gpu-seconds**: ``sum over GPUs of seconds held``, times a price. It flatters whoever keeps GPUs full: a
  policy that frees memory but no whole GPU saves nothing; it is the bill that a renter of whole GPUs pays.

Gigabytes are 1e9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeless.cluster import GB, Cluster
from moeless.metrics.result import Billing


@dataclass
class Meter:
    """Accumulates a run's bills.

    Attributes:
        own_layer_byte_seconds: sum of d_il * R_il * M_e.
        whole_byte_seconds: sum of d_il times the bytes of all layers' live replicas.
        misc_byte_seconds: sum of misc_i * M_misc, the non-expert part of the paper's formula.
        resident_byte_seconds: sum over expert copies of bytes times seconds in memory.
        gpu_seconds: sum over GPUs of seconds held.
    """

    own_layer_byte_seconds: float = 0.0
    whole_byte_seconds: float = 0.0
    misc_byte_seconds: float = 0.0
    resident_byte_seconds: float = 0.0
    gpu_seconds: float = 0.0

    def bill(self, cluster: Cluster) -> Billing:
        """The three bills at the cluster's list price."""
        return Billing(
            paper=(self.own_layer_byte_seconds + self.misc_byte_seconds) / GB,
            resident=self.resident_byte_seconds / GB,
            gpu_seconds=self.gpu_seconds,
            paper_whole=(self.whole_byte_seconds + self.misc_byte_seconds) / GB,
            gpu_dollars=self.gpu_seconds * cluster.device.price_per_hour / 3600.0,
        )
