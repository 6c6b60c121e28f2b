"""What happened in each (iteration, layer), kept small enough for millions of them."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import FloatArray
from moeless.metrics.latency import cdf, summarise
from moeless.metrics.result import LayerMetrics
from moeless.simulator import tally as columns

PARTS = {
    "expert": columns.EXPERT,
    "all_to_all": columns.EXCHANGE,
    "misc": columns.MISC,
    "control": columns.CONTROL,
    "stall": columns.STALL,
}


#: Marks kept at most; beyond, every second one goes.
MARKS = 1024


class LayerRecord:
    """Layer times of every pair, and sums of everything else.

    Attributes:
        tally: sums over the pairs recorded, by the columns of ``moeless.simulator.tally``.
        stalls: exposed waiting by cause, seconds over the whole run.
        marks: (iterations, replica-seconds and misc seconds billed, replicas counted) so far, now and then: how evenly
            these grew, for intervals.
    """

    def __init__(self, num_layers: int) -> None:
        self._times = np.empty((1024, num_layers), np.float32)
        self._iterations = 0
        self._billed = np.zeros(columns.NUM_TALLIES)
        self.tally = np.zeros(columns.NUM_TALLIES)
        self.stalls: dict[str, float] = defaultdict(float, cold=0.0)
        self.marks: list[tuple[int, float, float, float]] = []

    def append(self, time_IL: FloatArray) -> None:
        """Keep the layer seconds of some iterations; their tally has been added already."""
        need = self._iterations + len(time_IL)
        while need > len(self._times):
            self._times = np.concatenate([self._times, np.empty_like(self._times)])
        self._times[self._iterations : need] = time_IL
        self._iterations = need
        own, misc, replicas = (float(self.tally[at]) for at in (columns.OWN, columns.MISC, columns.REPLICAS))
        self.marks.append((need, own, misc, replicas))
        if len(self.marks) > MARKS:
            del self.marks[::2]

    def restart(self) -> None:
        """End of warm-up: forget the figures, keep what is billed."""
        self._billed += self.tally
        self.tally[:] = 0.0
        self._iterations = 0
        self.marks.clear()

    @property
    def billed(self) -> FloatArray:
        """The tally with the warm-up's."""
        return self._billed + self.tally

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
        mean = self.tally / len(times)
        return LayerMetrics(
            mean_ms=1e3 * float(mean[columns.TOTAL]),
            p50_ms=1e3 * summary.median,
            p99_ms=1e3 * summary.p99,
            imbalance=float(mean[columns.IMBALANCE]),
            replicas=float(mean[columns.REPLICAS]),
            moved_bytes=moved_bytes,
            warm_rate=float(mean[columns.WARM] / mean[columns.REPLICAS]) if mean[columns.REPLICAS] else 1.0,
            stalls=dict(self.stalls),
            samples=len(times),
            p90_ms=1e3 * summary.p90,
            balancedness=float(mean[columns.BALANCED]),
            active_experts=float(mean[columns.ACTIVE]),
            parts_ms={part: 1e3 * float(mean[column]) for part, column in PARTS.items()},
            cdf_ms=tuple(1e3 * value for value in cdf(times)),
        )
