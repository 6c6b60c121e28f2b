"""Plans made before each iteration's layers: forecast, plan, load, in time or late.

When layer l starts, the forecast for layer l + d starts beside it. The plan is there ``background_seconds`` later;
its copies begin to load at that moment. A layer that starts before its plan is there runs under the plan before,
and the new one follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import BoolArray, Context, Forecast, IntArray, LayerPlan, Phase
from moeless.serverless import InstancePool
from moeless.simulator.failures import Outage
from moeless.simulator.history import LoadHistory
from moeless.simulator.keeping import Keeping
from moeless.simulator.runtime import PolicyRuntime


@dataclass(frozen=True)
class Work:
    """One iteration as the layers see it; the optional arrays are filled where the predictor reads them."""

    load_LSE: IntArray
    phase: Phase
    tokens: int
    topk_TLK: NDArray[np.uint16] | None = None
    router_input_TLH: NDArray[Any] | None = None


class AheadPlans:
    """Plans in force, and those on their way.

    Attributes:
        plans: the plan in force of each layer.
        late: plans that came after their layer had started.
        made: plans in all.
        keeping: which forecasts leave their plans as they are.
    """

    def __init__(
        self, runtime: PolicyRuntime, pool: InstancePool, history: LoadHistory, plans: list[LayerPlan], outage: Outage
    ) -> None:
        self.runtime, self.pool, self.history, self.plans, self.outage = runtime, pool, history, plans, outage
        self.delay = runtime.costs.background_seconds(runtime.policy)
        self.late = 0
        self.made = 0
        self.keeping = Keeping(runtime)
        self._kept_L = np.zeros(runtime.spec.L, np.bool_)
        self._coming: dict[int, tuple[LayerPlan, float]] = {}

    def start_iteration(self, work: Work, now: float, kept_L: BoolArray) -> None:
        """Layers that nothing precedes by the distance are planned as the iteration starts, from the past."""
        self._kept_L = kept_L
        for layer in range(min(self.runtime.policy.distance, self.runtime.spec.L)):
            if kept_L[layer]:
                continue
            mean_E = self.history.share_or_even(layer) * (work.tokens * self.runtime.spec.K)
            # known since the last iteration: nothing has to be waited for
            self._decide(layer, Forecast(mean_E, mean_E.copy(), work.tokens, "history"), work.phase, now, 0.0)

    def start_layer(self, layer: int, work: Work, now: float) -> None:
        """Layer ``layer`` starts: the layer ahead is forecast."""
        distance = self.runtime.policy.distance
        target = layer + distance
        if target >= self.runtime.spec.L or self._kept_L[target]:
            return
        context = Context(
            router_input_TH=None if work.router_input_TLH is None else work.router_input_TLH[:, layer],
            topk_TK=None if work.topk_TLK is None else work.topk_TLK[:, layer],
            history_E=self.history.share(target),
            last_load_E=self.history.last(target, work.phase),
            tokens=work.tokens,
            phase=work.phase,
            true_load_E=work.load_LSE[target].sum(0),
        )
        forecast: Forecast = self.runtime.predictor.predict(context, layer, distance)
        self._decide(target, forecast, work.phase, now, self.delay)

    def _decide(self, layer: int, forecast: Forecast, phase: Phase, now: float, delay: float) -> None:
        self.pool.expire(layer, now)
        previous = self.pool.alive(self.plans[layer])
        plan = self.runtime.plan(layer, phase, forecast, previous, self.pool.states_unless_live(previous, now))
        self.keeping.note(layer, forecast.mean_E, plan)
        self.made += 1
        self._coming[layer] = self.outage.evacuate(plan), now + delay

    def in_force(self, layer: int, now: float) -> LayerPlan:
        """The plan with which a layer that starts at ``now`` runs."""
        if layer in self._coming and self._coming[layer][1] <= now:
            self._adopt(layer)
        return self.plans[layer]

    def layer_ran(self, layer: int) -> None:
        """After a layer: a plan that came too late for it is the one in force from now on."""
        if layer in self._coming:
            self.late += 1
            self._adopt(layer)

    def _adopt(self, layer: int) -> None:
        plan, since = self._coming.pop(layer)
        self.pool.provision(layer, plan.expert_R, plan.gpu_R, since)
        self.plans[layer] = plan
