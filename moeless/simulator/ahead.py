"""Plans made before each iteration's layers: forecast, plan, load, in time or late.

When layer l starts, the forecast for layer l + d starts beside it, with d given or chosen per layer
(``predictors.distance``). The plan is there ``background_seconds`` later; its copies begin to load at that moment. A
layer that starts before its plan is there runs under the plan before, and the new one follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import BoolArray, Context, Forecast, IntArray, LayerPlan, Phase
from moeless.policy import LoadHistory, ResolvedPolicy
from moeless.predictors.distance import NEWEST
from moeless.predictors.forecast_horizon import ForecastHorizon
from moeless.serverless import InstancePool
from moeless.simulator.failures import Outage
from moeless.simulator.in_force import PlansInForce
from moeless.simulator.keeping import Keeping
from moeless.simulator.routing import Replay, SpanColumns


@dataclass
class Work:
    """One iteration as the layers see it; the optional arrays are filled where the predictor reads them.

    ``given_LSE`` are loads that stand for those of the tokens (the oracle's override).
    """

    replay: Replay
    spans: SpanColumns
    phase: Phase
    tokens: int
    topk_TLK: NDArray[np.uint16] | None = None
    router_input_TLH: NDArray[Any] | None = None
    token_T: NDArray[np.integer[Any]] | None = None
    given_LSE: IntArray | None = None

    @cached_property
    def load_LSE(self) -> IntArray:
        """Tokens by layer, source rank and expert."""
        return self.replay.loads(self.spans) if self.given_LSE is None else self.given_LSE

    @cached_property
    def load_LE(self) -> IntArray:
        """Tokens by layer and expert; compiled loops, which count them by the way, assign them."""
        return self.load_LSE.sum(1)

    @cached_property
    def sorted_T(self) -> tuple[IntArray, IntArray]:
        """The tokens' rows in the replay and their source ranks, in order of these."""
        return self.replay.sorted_tokens(self.spans)


class AheadPlans:
    """Plans in force, and those on their way.

    Attributes:
        plans: the plan in force of each layer.
        late: plans that came after their layer had started.
        made: plans in all.
        keeping: which forecasts leave their plans as they are.
        copy_seconds: what bringing one copy is taken to need.
        layer_seconds: what a layer takes, with all around it, by phase.
    """

    def __init__(
        self, runtime: ResolvedPolicy, pool: InstancePool, history: LoadHistory, plans: PlansInForce, outage: Outage
    ) -> None:
        self.runtime, self.pool, self.history, self.plans, self.outage = runtime, pool, history, plans, outage
        self.delay = runtime.costs.background_seconds(runtime.planner.control)
        self.late = 0
        self.made = 0
        self.keeping = Keeping(runtime)
        self._kept_L = np.zeros(runtime.spec.L, np.bool_)
        self._coming: dict[int, tuple[LayerPlan, float]] = {}
        self.rule = runtime.distance_rule(float(pool.tier_seconds.max()))
        self._distance_L = np.full(runtime.spec.L, runtime.policy.distance)
        self.life = ForecastHorizon(history.shares_or_even())
        # a copy comes from the next GPU that has one, and every expert is on some
        near = runtime.cluster.num_gpus <= runtime.cluster.island_size
        self.copy_seconds = float(pool.tier_seconds[0 if near else 1]) + pool.settings.start_seconds
        self.layer_seconds: dict[Phase, float] = {}

    def start_iteration(self, work: Work, now: float, kept_L: BoolArray) -> None:
        """Layers that nothing precedes by the distance are planned as the iteration starts, from the past."""
        self._kept_L = kept_L
        if self.rule is not None:
            self._distance_L = self.rule.choose(work.phase, work.tokens)
        for layer, distance in enumerate(self._distance_L.tolist()):
            if layer < distance and not kept_L[layer]:
                # known since the last iteration: nothing has to be waited for
                self._decide(layer, self.forecast(layer, distance, work), work.phase, now, 0.0, layer)

    def forecast(self, target: int, distance: int, work: Work) -> Forecast:
        """The forecast for a layer from the one ``distance`` before it, or from the past where there is none."""
        if target < distance:
            return self._first(target, distance, work)
        source = target - distance
        forecast: Forecast = self.runtime.predictor.predict(self._context(target, work, source), source, distance)
        return forecast

    def _first(self, target: int, distance: int, work: Work) -> Forecast:
        """From the past alone: history, or what the predictor found best for layers that nothing precedes."""
        if self.runtime.predictor.forecasts_first:
            forecast: Forecast = self.runtime.predictor.predict(
                self._context(target, work), target - distance, distance
            )
            return forecast
        return self.runtime.from_share(self.history.share(target), work.tokens)

    def start_layer(self, layer: int, work: Work, now: float) -> None:
        """Layer ``layer`` starts: the layers that are forecast from it are."""
        for target in range(layer + 1, self.runtime.spec.L):
            distance = target - layer
            if self._distance_L[target] == distance and not self._kept_L[target]:
                self._decide(target, self.forecast(target, distance, work), work.phase, now, self.delay, distance)

    def _context(self, target: int, work: Work, layer: int | None = None) -> Context:
        """What is known of a target, with what ``layer`` sees of the iteration where one is given."""
        inputs, topk = work.router_input_TLH, work.topk_TLK
        return self.history.context(
            target,
            work.tokens,
            work.phase,
            router_input_TH=None if inputs is None or layer is None else inputs[:, layer],
            topk_TK=None if topk is None or layer is None else topk[:, layer],
            true_load_E=work.load_LE[target],
            token_T=work.token_T,
        )

    def _decide(self, layer: int, forecast: Forecast, phase: Phase, now: float, delay: float, ahead: int) -> None:
        """Have a layer planned that begins ``ahead`` layers from now."""
        self.pool.expire(layer, now)
        previous = self.pool.alive(self.plans[layer])
        plan = self.runtime.plan(
            layer,
            phase,
            forecast,
            previous,
            self.pool.states_unless_live(previous, now),
            self.life.horizon(layer, phase, forecast, self.history.share(layer)),
            max(ahead * self.layer_seconds.get(phase, 0.0) - delay, 0.0),
            self.copy_seconds,
        )
        self.keeping.note(layer, forecast.mean_E, plan)
        self.made += 1
        self._coming[layer] = self.outage.evacuate(plan), now + delay

    def in_force(self, layer: int, now: float) -> LayerPlan:
        """The plan with which a layer that starts at ``now`` runs."""
        if layer in self._coming and self._coming[layer][1] <= now:
            self._adopt(layer)
        return self.plans[layer]

    def layer_ran(self, layer: int, phase: Phase, seconds: float) -> None:
        """After a layer: a plan that came too late for it is the one in force from now on."""
        if self.rule is not None:
            self.rule.note(layer, phase, seconds)
        known = self.layer_seconds.setdefault(phase, seconds)
        self.layer_seconds[phase] = known + NEWEST * (seconds - known)
        if layer in self._coming:
            self.late += 1
            self._adopt(layer)

    def _adopt(self, layer: int) -> None:
        plan, since = self._coming.pop(layer)
        self.pool.provision(layer, plan.expert_R, plan.gpu_R, since)
        self.plans[layer] = plan
