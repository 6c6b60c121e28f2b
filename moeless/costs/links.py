"""Times of bringing weights to a GPU over the links that a cluster states."""

from __future__ import annotations

from moeless.cluster import Cluster
from moeless.errors import UserError

SOURCE_TIERS = ("local", "peer", "peer-slow", "host", "storage")


def transfer_seconds(cluster: Cluster, num_bytes: float, source_tier: str) -> float:
    """Seconds to bring ``num_bytes`` of weights to a GPU; ``local`` is already there.

    Raises:
        UserError: the tier is none of ``SOURCE_TIERS``.
    """
    device = cluster.device
    if source_tier == "local":
        return 0.0
    if source_tier == "peer":
        return cluster.fast.latency + num_bytes / cluster.fast.bandwidth
    if source_tier == "peer-slow":
        return cluster.slow.latency + num_bytes / cluster.slow.bandwidth
    if source_tier == "host":
        return num_bytes / device.host_bandwidth
    if source_tier == "storage":
        # storage feeds the host and the host the GPU, in a stream: the slower one counts
        return num_bytes / min(device.storage_bandwidth, device.host_bandwidth)
    raise UserError(f"no source tier is called {source_tier!r}; there are: {', '.join(SOURCE_TIERS)}")
