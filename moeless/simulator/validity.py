"""What makes a simulated figure doubtful, said beside it."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeless.metrics.latency import MIN_SAMPLES_P99
from moeless.metrics.result import RequestMetrics
from moeless.workloads.one_second import OneSecond
from moeless.workloads.scheduler import Queueing

#: Busy share of the time above which queueing, not service, decides latency.
SATURATED = 0.95
#: Seconds that requests wait on average before they begin, above which a busy continuous batch counts as full. One that
#: takes everybody in at the next iteration is busy without being near its limit.
NOTICEABLE_WAIT = 0.1


def check_validity(
    figures: RequestMetrics | None,
    scheduler: Any,
    *,
    samples: int,
    busy_fraction: float,
    cold_start_seconds: float = 0.0,
) -> tuple[RequestMetrics | None, list[str]]:
    """Withhold request figures that mean nothing, and say in sentences what weakens the rest.

    Args:
        cold_start_seconds: what a request may wait for GPUs that were given back, which is no queue.
    """
    warnings: list[str] = []
    queueing = scheduler.queueing() if hasattr(scheduler, "queueing") else None
    if queueing is not None and queueing.piled_up and cold_start_seconds > 0.0:
        queueing = Queueing.judge(np.maximum(0.0, queueing.wait_N - cold_start_seconds))
    if queueing is not None and queueing.piled_up:
        if isinstance(scheduler, OneSecond):
            warnings.append("one-second batches pile up: request metrics are undefined at this rate")
            figures = None
        else:
            warnings.append("the queue grew over the run: the rate exceeds what is served, latency depends on duration")
    elif busy_fraction > SATURATED and _full(scheduler, queueing):
        warnings.append(f"the cluster was busy {100 * busy_fraction:.0f} % of the time: near saturation")
    if figures is not None and figures.completed < MIN_SAMPLES_P99:
        warnings.append(f"only {figures.completed} requests: a p99 of fewer than {MIN_SAMPLES_P99} is one observation")
    if figures is not None and figures.failed:
        warnings.append(f"{figures.failed} requests were not completed")
    if samples < MIN_SAMPLES_P99:
        warnings.append(f"only {samples} layer samples: their p99 is one observation")
    return figures, warnings


def _full(scheduler: Any, queueing: Queueing | None) -> bool:
    """Whether a busy server makes requests wait."""
    if queueing is None or isinstance(scheduler, OneSecond) or not len(queueing.wait_N):
        return True
    return bool(queueing.wait_N.mean() > NOTICEABLE_WAIT)
