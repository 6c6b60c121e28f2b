"""Elastic with layers whose shares are fixed ahead: what its guarantee costs, and what giving it up gains.

Dispatch after the gate costs control time: counts are gathered and copies chosen in every layer. Ahead of time, per
layer and phase, this planner chooses on the forecast's scenarios among

(a) static EP, without extras and without control;
(b) ``elastic``'s extras with dispatch after the gate, its control time charged: never slower than static EP but by
    that time, whatever the forecast;
(c) extras whose shares are fixed ahead from the forecast, with nothing to gather and to decide. **Layers of this kind
    cannot carry elastic's guarantee**: where the forecast is wrong they may be slower than static EP. They are taken
    only where they are expected to beat both others by a margin that grows with the forecast's spread.

Primaries never leave their static GPUs here either. Where control costs nothing this is ``elastic``.

Axes: E experts, R replicas, G GPUs, S source ranks, C scenarios.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moeless.contracts import Phase
from moeless.errors import UserError
from moeless.placement import elastic
from moeless.placement.elastic import ElasticParams
from moeless.placement.fixed_shares import FixedTerms, fix_layers
from moeless.placement.plan_reuse import ReuseTerms
from moeless.placement.plan_rows import PlanBatch, PlanRows
from moeless.placement.setting import Setting
from moeless.placement.threads import in_parallel


@dataclass(frozen=True)
class ElasticAheadParams(ElasticParams):
    """Elastic's parameters, and those of shares fixed ahead.

    Attributes:
        share_scenarios: loads drawn to fix shares on, and as many others to compare the three kinds; 0: ``elastic``.
        spread, decode_spread: relative spread that these loads have at least, unless the forecast states none.
        caution: standard deviations, over scenarios, of what fixed shares save that are left out of their gain.
        margin: part of static EP's time that is left out of it besides: no number of scenarios shows all that is rare.
    """

    share_scenarios: int = 32
    spread: float = 0.25
    decode_spread: float = 0.1
    caution: float = 0.2
    margin: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("share_scenarios", "spread", "decode_spread", "caution", "margin"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must be a number of at least 0, got {getattr(self, name)}")

    def spread_of(self, phase: Phase) -> float:
        """The least relative spread of the loads that shares are fixed on."""
        return float(self.decode_spread if phase == Phase.DECODE else self.spread)


def fixed_terms(setting: Setting) -> FixedTerms:
    """What :func:`fixed_shares.fix_layers` needs beside elastic's terms."""
    spec, params = setting.spec, setting.params
    control_L = [setting.costs.control_seconds(elastic.DISPATCH.control, layer) for layer in range(spec.L)]
    deviates_CE = elastic.scenario_deviates_CE(params.seed, 2 * params.share_scenarios, spec.E)
    return FixedTerms(deviates_CE, np.array(control_L, np.float64), float(params.caution), float(params.margin))


def plan_layers(batch: PlanBatch, setting: Setting) -> PlanRows:
    """Of static EP, dispatch after the gate, and shares fixed ahead what is expected to be the fastest.

    Raises:
        UserError: a GPU has no room for its static experts.
    """
    params: ElasticAheadParams = setting.params
    rows = elastic.plan_layers(batch, setting)
    fixed, terms = setting.derived(fixed_terms), setting.derived(elastic.choice_terms)
    copy_G, costs, spread = elastic.copy_seconds_G(batch, setting), setting.costs, params.spread_of(batch.phase)

    def some(start: int, stop: int) -> None:
        fix_layers(
            start, stop, batch.layer_N, batch.mean_NE, batch.var_NE, spread, batch.previous, batch.horizon_N,
            batch.lead_N, copy_G, fixed, terms, costs.layer_costs, rows,
        )  # fmt: skip

    in_parallel(some, len(batch), len(batch) * len(terms.gpu_E) * max(1, params.share_scenarios))
    return rows


def reuse(setting: Setting) -> ReuseTerms:
    """As elastic's. Shares fixed ahead may pay where dispatch does not: no bound on its gain keeps a layer static."""
    terms = elastic.reuse(setting)
    return terms._replace(skip_L=np.full_like(terms.skip_L, -1.0))


#: Layers whose shares are fixed ahead gather nothing; the others are dispatched, and charged, as ``elastic``'s.
PLANNER = replace(
    elastic.PLANNER,
    name="elastic-ahead",
    plan_layers=plan_layers,
    params=ElasticAheadParams,
    source="this project: elastic, and shares fixed ahead where dispatch does not pay for its control (no guarantee)",
    reuse=reuse,
)
