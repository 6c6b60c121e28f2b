"""Planning beside the model: a thread plans while the layer computes, and the time it shows is kept by cause."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from moeless.contracts import Forecast, LayerPlan, Phase
from moeless.engine.core import PartTimes
from moeless.policy import ResolvedPolicy


class Planning:
    """One policy's plans on their way.

    Every rank plans the same from the same words, so that no plan has to travel; asking and collecting happen at the
    same points on all of them.
    """

    def __init__(self, policy: ResolvedPolicy) -> None:
        self.policy = policy
        self._pool = ThreadPoolExecutor(1, "moeless-planning")
        self._asked: list[Future[tuple[LayerPlan, float]]] = []
        self._own_at_ask = 0.0
        self._times = PartTimes()

    def ask(
        self,
        layer: int,
        phase: Phase,
        forecast: Forecast,
        previous: LayerPlan,
        state_R: Any,
        horizon: int,
        copy_seconds: float,
    ) -> None:
        """Have one layer planned."""
        if not self._asked:
            self._own_at_ask = time.thread_time()

        def work() -> tuple[LayerPlan, float]:
            started = time.thread_time()
            plan = self.policy.plan(layer, phase, forecast, previous, state_R, horizon, copy=copy_seconds)
            return plan, time.thread_time() - started

        self._asked.append(self._pool.submit(work))

    def collect(self) -> list[LayerPlan]:
        """The plans asked for since the last time, in that order; waits for them."""
        if not self._asked:
            return []
        # what this thread did meanwhile hides that much of the planner's own time
        hidden = time.thread_time() - self._own_at_ask
        began = time.perf_counter()
        found = [future.result() for future in self._asked]
        self._times.plan_wait += time.perf_counter() - began
        own = sum(seconds for _, seconds in found)
        self._times.planning += own
        self._times.plan_exposed += max(0.0, own - hidden)
        self._asked.clear()
        return [plan for plan, _ in found]

    def settle(self, times: PartTimes) -> None:
        """Move the seconds since the last time to a layer's record."""
        times.planning += self._times.planning
        times.plan_wait += self._times.plan_wait
        times.plan_exposed += self._times.plan_exposed
        self._times = PartTimes()

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._asked.clear()
