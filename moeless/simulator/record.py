"""What happened in each (iteration, layer), kept small enough for millions of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import FloatArray, IntArray
from moeless.metrics import balance
from moeless.metrics.latency import cdf, summarise
from moeless.metrics.result import LayerMetrics


@dataclass(frozen=True)
class LayerStep:
    """One iteration's layers, seconds and counts, each ``[L]``; ``load_LG`` is tokens per GPU."""

    expert_L: FloatArray
    exchange_L: FloatArray
    misc_L: FloatArray
    control_L: FloatArray
    stall_L: FloatArray
    load_LG: FloatArray
    replicas_L: IntArray
    active_L: IntArray
    warm_L: IntArray

    @property
    def total_L(self) -> FloatArray:
        """Forward time of each MoE layer."""
        return self.expert_L + self.exchange_L + self.misc_L + self.control_L + self.stall_L


PARTS = ("expert", "all_to_all", "misc", "control", "stall")


class LayerRecord:
    """Layer times of every pair, and sums of everything else."""

    def __init__(self, num_layers: int) -> None:
        self._times = np.empty((1024, num_layers), np.float32)
        self._iterations = 0
        self._sums: dict[str, float] = defaultdict(float)
        self.stalls: dict[str, float] = defaultdict(float)

    def add(self, step: LayerStep) -> None:
        """Record one iteration."""
        if self._iterations == len(self._times):
            self._times = np.concatenate([self._times, np.empty_like(self._times)])
        self._times[self._iterations] = step.total_L
        self._iterations += 1
        sums = self._sums
        ratio_L = balance.imbalance(step.load_LG)
        sums["total"] += float(step.total_L.sum())
        sums["imbalance"] += float(ratio_L.sum())
        sums["balancedness"] += float((1.0 / ratio_L).sum())
        sums["replicas"] += float(step.replicas_L.sum())
        sums["active"] += float(step.active_L.sum())
        sums["warm"] += float(step.warm_L.sum())
        columns = (step.expert_L, step.exchange_L, step.misc_L, step.control_L, step.stall_L)
        for part, seconds_L in zip(PARTS, columns, strict=True):
            sums[part] += float(seconds_L.sum())

    @property
    def iterations(self) -> int:
        """Iterations recorded."""
        return self._iterations

    @property
    def times_IL(self) -> NDArray[np.float32]:
        """Forward seconds of every layer in every iteration."""
        return self._times[: self._iterations]

    def metrics(self, moved_bytes: float) -> LayerMetrics | None:
        """The result's layer figures; None where nothing was recorded."""
        times = self.times_IL.ravel()
        summary = summarise(times)
        if summary is None:
            return None
        n = len(times)
        sums = {name: value / n for name, value in self._sums.items()}
        return LayerMetrics(
            mean_ms=1e3 * sums["total"],
            p50_ms=1e3 * summary.median,
            p99_ms=1e3 * summary.p99,
            imbalance=sums["imbalance"],
            replicas=sums["replicas"],
            moved_bytes=moved_bytes,
            warm_rate=sums["warm"] / sums["replicas"] if sums["replicas"] else 1.0,
            stalls=dict(self.stalls),
            samples=n,
            p90_ms=1e3 * summary.p90,
            balancedness=sums["balancedness"],
            active_experts=sums["active"],
            parts_ms={part: 1e3 * sums[part] for part in PARTS},
            cdf_ms=tuple(1e3 * value for value in cdf(times)),
        )
