"""Which iterations that plan, or wait for copies, are one compiled call, and what that call takes."""

from __future__ import annotations

import numpy as np

from moeless.contracts import BoolArray, FloatArray, IntArray, Phase
from moeless.errors import RunFailed
from moeless.machine import cores
from moeless.placement import elastic, elastic_ahead, paper
from moeless.placement.choose_kernels import ChoiceTerms
from moeless.placement.paper import PaperTerms
from moeless.placement.threads import in_parallel
from moeless.policy import ResolvedPolicy
from moeless.simulator.ahead import AheadPlans, Work
from moeless.simulator.fixed_plan_kernels import FixedTerms, no_fixed
from moeless.simulator.plan_rows import Plans, room_for
from moeless.simulator.planned_kernels import (
    AHEAD,
    ELASTIC,
    PAPER,
    PlannerTerms,
    guess_layers,
    guesses,
    planned_iteration,
)
from moeless.simulator.record import LayerRecord

#: Planners that are compiled.
_COMPILED = (paper.plan_layer, elastic.plan_layer, elastic_ahead.plan_layer)
#: What planning one layer takes, in expert loads looked at (see ``placement.threads``).
PLAN_WORK = 20_000


def _no_elastic(num_gpus: int) -> ChoiceTerms:
    none_G = np.zeros(num_gpus, np.int64)
    return ChoiceTerms(np.zeros((0, 0)), none_G, none_G, 0, 0.0, 0.0, 0.0, 0, 0, 0.0, 0.0)


class PlannedIterations:
    """A policy's iterations layer by layer on the clock, compiled.

    Args:
        runtime: the policy; its costs must be numbers for compiled code.
        mode, rates: its dispatch, as in ``layer_kernels.time_layer``.
        control_L: seconds that each layer's decisions after the gate take.

    Attributes:
        shares: whether plans may fix shares ahead.
        plans: whether the planner is a compiled one with a fixed distance; otherwise only iterations that plan
            nothing can run here.
    """

    def __init__(
        self, runtime: ResolvedPolicy, ahead: AheadPlans, mode: int, rates: tuple[float, ...], control_L: FloatArray
    ) -> None:
        self.runtime, self.ahead, self._mode, self._rates, self._control_L = runtime, ahead, mode, rates, control_L
        spec, gpus, planner = runtime.spec, runtime.cluster.G, runtime.planner.plan_layer
        self.plans = ahead.rule is None and planner in _COMPILED
        kind, distance, skip_L, self._patience = PAPER, 1, np.full(spec.L, -1.0), 1
        by_paper = PaperTerms(0, 0.0, False, True, np.zeros(gpus, np.int64))
        by_elastic, widest = _no_elastic(gpus), spec.E
        self._doubts, self._spreads = dict.fromkeys(Phase, 0.0), dict.fromkeys(Phase, 0.0)
        self.shares, fixed = planner is elastic_ahead.plan_layer, no_fixed(spec.L, spec.E)
        if self.plans:
            distance = int(runtime.policy.distance)
        if self.plans and planner is paper.plan_layer:
            by_paper = paper.plan_terms(spec, runtime.cluster, runtime.budget, runtime.params)
            widest += by_paper.max_extra
        elif self.plans:
            params, kind = runtime.params, ELASTIC
            if self.shares:
                kind = AHEAD
                fixed = FixedTerms(*elastic_ahead.fixed_terms(runtime.costs, params))
                self._spreads = {phase: params.spread_of(phase) for phase in Phase}
            by_elastic = elastic._choice_terms(spec, runtime.costs, runtime.budget, params)
            self._patience = int(params.patience_iterations)
            widest += by_elastic.extra
            self._doubts = {phase: params.doubt_of(phase) for phase in Phase}
            skip_L = np.array([elastic.skip_seconds(runtime.costs, layer, params) for layer in range(spec.L)])
        self.widest = widest
        copy_G = np.full(gpus, ahead.copy_seconds)
        self._terms = PlannerTerms(kind, distance, float(ahead.delay), copy_G, skip_L, by_paper, by_elastic, fixed)
        self._misc = runtime.costs.misc_seconds()
        self._coming: Plans | None = None
        # where more copies than that linger beside a plan, it is made when its turn comes
        self._made = guesses(spec.L, min(spec.E * gpus, 8 * widest))

    def forecasts(self, work: Work, kept_L: BoolArray) -> tuple[FloatArray, FloatArray, IntArray]:
        """Of each layer that is not kept, mean and variance of its load, ``[L, E]``, and the iterations to weigh over.

        Nothing of them depends on what happens during the iteration, so all are made before it.
        """
        ahead, history, spec = self.ahead, self.ahead.history, self.runtime.spec
        first = min(self._terms.distance, spec.L)
        horizon_L = np.full(spec.L, self._patience)
        total_L = history.weight_LE.sum(1)
        if self.runtime.predictor.from_history and (total_L > 0).all():
            share_LE = history.weight_LE / total_L[:, None]
            mean_LE = np.empty_like(share_LE)
            mean_LE[:first] = share_LE[:first] * (work.tokens * spec.K)
            # as the predictor makes shares of shares
            share_LE /= share_LE.sum(1)[:, None]
            scale_L = (work.tokens * spec.K) / share_LE.sum(1)
            mean_LE[first:] = share_LE[first:] * scale_L[first:, None]
            return mean_LE, mean_LE, horizon_L
        mean_LE, var_LE = np.zeros((2, spec.L, spec.E))
        for layer in np.flatnonzero(~kept_L).tolist():
            forecast = ahead.forecast(layer, self._terms.distance, work)
            mean_LE[layer], var_LE[layer] = forecast.mean_E, forecast.var_E
            if self._terms.kind != PAPER:
                told = ahead.life.horizon(layer, work.phase, forecast, history.share(layer))
                horizon_L[layer] = told or self._patience
        return mean_LE, var_LE, horizon_L

    def run(
        self, work: Work, clock: float, per_layer: float, kept_L: BoolArray, settled_at: float, cause: str,
        record: LayerRecord, time_L: FloatArray,
    ) -> float:  # fmt: skip
        """Run one iteration's layers from ``clock`` on, planning all but those kept; returns when the last ended.

        Args:
            settled_at, cause: what layers wait for until then.
            record: gets the tally and the stalls; ``time_L`` the layers' seconds.

        Raises:
            RunFailed: tokens need an expert whose copies nothing loads.
        """
        ahead, plans = self.ahead, self.ahead.plans.rows()
        planned = self.plans and not kept_L.all()
        mean_LE = var_LE = ahead.history.weight_LE
        horizon_L = np.empty(0, np.int64)
        if planned:
            mean_LE, var_LE, horizon_L = self.forecasts(work, kept_L)
        if self._coming is None or self._coming.expert_LR.shape != plans.expert_LR.shape:
            self._coming = room_for(len(plans.expert_LR), plans.expert_LR.shape[1], self.shares)
        stall_2, stalled_2 = np.array([record.stalls.get(cause, 0.0), record.stalls["cold"]]), np.zeros(2, np.bool_)
        load_LE = np.empty((self.runtime.spec.L, self.runtime.spec.E), np.int64)
        pace_1 = np.array([ahead.layer_seconds.get(work.phase, np.nan)])
        pool = ahead.pool.state()
        if planned and self._terms.kind != PAPER and cores() > 1:
            layer_N = np.flatnonzero(~kept_L)

            def some(start: int, stop: int) -> None:
                guess_layers(
                    start, stop, layer_N, mean_LE, var_LE, self._doubts[work.phase], horizon_L, pace_1[0], self._terms,
                    plans, self._coming, pool, self._made,
                )  # fmt: skip

            in_parallel(some, len(layer_N), len(layer_N) * PLAN_WORK)
        end, late, failed = planned_iteration(
            work.replay.topk_TLK, *work.sorted_T, load_LE, mean_LE, var_LE, horizon_L, self._doubts[work.phase],
            self._spreads[work.phase], kept_L, pace_1, clock, per_layer, self._terms, plans, self._coming,
            self._made, pool, ahead.keeping.terms, self._mode, self._rates, self.runtime.costs.kernel_terms(),
            self._misc, self._control_L,
            # one account where the cause is the same
            settled_at if cause != "cold" else -np.inf, stall_2, stalled_2, record.tally, time_L,
        )  # fmt: skip
        if planned:
            ahead.plans.changed()
            ahead.made += int((~kept_L).sum())
            ahead.late += late
            ahead.layer_seconds[work.phase] = float(pace_1[0])
        work.load_LE = load_LE
        if failed >= 0:
            raise RunFailed(NO_ROOM.format(layer=failed))
        for name, seconds, touched in zip((cause, "cold"), stall_2.tolist(), stalled_2.tolist(), strict=True):
            if touched:
                record.stalls[name] = seconds
        return float(end)


#: Why a run ends where no copy of an expert with tokens can be loaded.
NO_ROOM = (
    "layer {layer}: GPU memory has no room for any copy of an expert that tokens need; "
    "use more GPUs, fewer extra slots or fewer running requests"
)
