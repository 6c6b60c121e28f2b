"""Times of moving bytes: weights to a GPU, and tokens between GPUs over two link tiers."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moeless.cluster import Cluster
from moeless.contracts import FloatArray
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


@lru_cache(maxsize=64)
def same_island(cluster: Cluster) -> NDArray[np.bool_]:
    """Which GPU pairs the fast links join, ``[G, G]``."""
    island = np.arange(cluster.num_gpus) // cluster.island_size
    return np.asarray(island[:, None] == island[None, :])


def all_to_all_seconds(cluster: Cluster, bytes_SG: FloatArray) -> float:
    """One direction of an exchange under an alpha-beta model, local bytes free.

    Each GPU's fast and slow links work at once; the fullest link of either direction decides:
    ``max over tiers of (latency + max over GPUs of max(sent, received) / bandwidth)``.
    """
    sizes = np.array(bytes_SG, np.float64)
    if cluster.num_gpus == 1:
        return 0.0
    np.fill_diagonal(sizes, 0.0)
    fast_pairs = same_island(cluster)
    worst = 0.0
    for link, pairs in ((cluster.fast, fast_pairs), (cluster.slow, ~fast_pairs)):
        if not pairs.any() or (link is cluster.fast and cluster.island_size == 1):
            continue
        tier = np.where(pairs, sizes, 0.0)
        most = max(tier.sum(0).max(), tier.sum(1).max())
        worst = max(worst, link.latency + most / link.bandwidth)
    return worst
