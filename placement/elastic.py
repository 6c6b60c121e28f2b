"""Elastic planner: extras ahead from a forecast, their use from the true counts, never slower than static EP.

Two stages. *Placement* leaves every primary on its static GPU, tries several rules for extra copies, judges each on
scenarios drawn from the forecast's mean and spread, and keeps the fewest extras that save what the best saves.
*Dispatch* sees the true counts after the gate and decides which copies work, with which shares; using primaries
alone is always among its choices, so it cannot lose to static EP under the cost model it was given.

Axes: E experts, R replicas, G GPUs, S source ranks, C scenarios.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moeless.contracts import FloatArray, Phase
from moeless.errors import UserError
from moeless.placement.base import Planner
from moeless.placement.dispatch import DispatchRule
from moeless.placement.elastic_placement import ChoiceTerms, check_layers, choose_layers
from moeless.placement.fastest_dispatch import deal_fastest
from moeless.placement.layout import static_layout
from moeless.placement.plan_reuse import ReuseTerms
from moeless.placement.plan_rows import PlanBatch, PlanRows, empty_rows
from moeless.placement.plan_scoring import mean_seconds_address
from moeless.placement.setting import Setting
from moeless.placement.threads import in_parallel


@dataclass(frozen=True)
class ElasticParams:
    """Parameters of both stages.

    Attributes:
        scenarios: loads drawn from the forecast to judge placements on; 0 takes the first rule's plan unjudged.
        doubt, decode_doubt: relative spread that a forecast is taken to have at least, whatever it states, unless it
            states none; a decode step mixes many requests, so that it strays less from the past than a prefill.
        economy: relative layer time that fewer extras may cost; extras that save less are left out.
        patience_iterations: iterations a change is taken to pay for where the caller states none
            (``PlanInput.horizon_iterations`` 0), weighed against the time its copies need to arrive.
        skip: leave a layer to static EP where dispatch is not expected to pay for its own control time.
        skip_margin: part of the control time by which the expected saving has to exceed it, for what scenarios do not
            show.
        skip_caution: standard errors, over the scenarios, that are left out of what dispatch is expected to save.
        depth: GPUs that a chain of moved load may pass on.
        keep: change of a forecast, relative to its tokens, below which a caller may keep the plan unasked (see
            ``plan_reuse``); 0 asks always.
        fuel: pairs of copies that the dispatch examines at most; a quarter as many in judging a placement. As many
            for every 64 GPUs, where there are more: otherwise the search ends before it has been to most of them.
        seed: of the scenarios.
    """

    scenarios: int = 8
    doubt: float = 0.5
    decode_doubt: float = 0.15
    economy: float = 1e-3
    patience_iterations: int = 256
    skip: bool = True
    skip_margin: float = 0.1
    skip_caution: float = 1.0
    depth: int = 4
    fuel: int = 400
    keep: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "scenarios",
            "doubt",
            "decode_doubt",
            "economy",
            "patience_iterations",
            "skip_margin",
            "skip_caution",
            "depth",
            "fuel",
            "keep",
            "seed",
        ):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must be a number of at least 0, got {getattr(self, name)}")

    def doubt_of(self, phase: Phase) -> float:
        """The least relative spread of a forecast for this phase."""
        return float(self.decode_doubt if phase == Phase.DECODE else self.doubt)


def fuel_on(num_gpus: int, fuel: int) -> int:
    """Pairs of copies that the dispatch examines at most on so many GPUs, given ``ElasticParams.fuel``."""
    return int(fuel * max(1, num_gpus // 64))


@lru_cache(maxsize=64)
def scenario_deviates_CE(seed: int, scenarios: int, num_experts: int) -> FloatArray:
    """Standard normal deviates of so many drawn loads, in mirrored pairs."""
    half = np.random.default_rng(seed).standard_normal((-(-scenarios // 2), num_experts))
    # mirrored pairs keep the scenarios' mean at the forecast's; taken in turn, so do the first of them
    return np.ascontiguousarray(np.stack([half, -half], axis=1).reshape(-1, num_experts)[:scenarios])


def rates(setting: Setting) -> tuple[float, float, float]:
    """The cost model as the search takes it: a, b, c of ``max(a n, b) + c n`` for n tokens.

    Seconds per token, of a weight read, and of exchange per token.
    """
    lines = setting.costs.terms()
    # where a layer ends with its slowest replica, levelling GPUs by tokens is what is left to do
    return max(lines.token_seconds, 1e-15), lines.floor_seconds, 2 * lines.link_seconds


def dispatch_numbers(setting: Setting) -> FloatArray:
    """What :func:`fastest_dispatch.deal_fastest` takes."""
    params: ElasticParams = setting.params
    return np.array([*rates(setting), params.depth, fuel_on(setting.cluster.num_gpus, params.fuel)], np.float64)


DISPATCH = DispatchRule(gathers_counts=True, deal=deal_fastest, numbers=dispatch_numbers, timed_as="elastic")


def choice_terms(setting: Setting) -> ChoiceTerms:
    """What :func:`elastic_placement.choose_layers` needs.

    Raises:
        UserError: a GPU has no room for its static experts.
    """
    spec, costs, params = setting.spec, setting.costs, setting.params
    gpu_E, room, extra = static_layout(setting.budget, spec, setting.cluster.num_gpus)
    skip_L = np.full(spec.L, -1.0)
    if params.skip:
        # what dispatch must be expected to save, or the layer is left to static EP
        control_L = [costs.control_seconds(DISPATCH.control, layer) for layer in range(spec.L)]
        skip_L = np.array(control_L) * (1 + params.skip_margin)
    return ChoiceTerms(
        scenario_deviates_CE(params.seed, params.scenarios, spec.E), gpu_E, room, extra, *rates(setting), params.depth,
        fuel_on(setting.cluster.num_gpus, params.fuel) // 4, float(params.economy), float(params.skip_caution), skip_L,
        int(params.patience_iterations), dispatch_numbers(setting), mean_seconds_address(),
    )  # fmt: skip


def host_seconds_G(setting: Setting) -> FloatArray:
    """Seconds in which an expert comes to each GPU from host memory."""
    costs, size = setting.costs, setting.spec.expert_bytes
    return np.array([costs.load_seconds(size, "host", gpu) for gpu in range(setting.cluster.num_gpus)], np.float64)


def copy_seconds_G(batch: PlanBatch, setting: Setting) -> FloatArray:
    """Seconds in which an expert comes to each GPU: as the batch states, otherwise from host memory."""
    if batch.copy_seconds is None:
        return setting.derived(host_seconds_G)
    return np.full(setting.cluster.num_gpus, float(batch.copy_seconds))


def plan_layers(batch: PlanBatch, setting: Setting) -> PlanRows:
    """Static primaries, and the fewest extras that close the gap for loads like the forecasts'.

    No extra at all where dispatch is not expected to save its own control time (the skip decision), and the previous
    extras where a change would not pay for its transfers. Layers are planned on as many threads as pay.

    Raises:
        UserError: a GPU has no room for its static experts.
    """
    params: ElasticParams = setting.params
    terms, copy_G = setting.derived(choice_terms), copy_seconds_G(batch, setting)
    experts = len(terms.gpu_E)
    rows, doubt, costs = empty_rows(len(batch), experts + terms.extra), params.doubt_of(batch.phase), setting.costs

    def some(start: int, stop: int) -> None:
        choose_layers(
            start, stop, batch.layer_N, batch.mean_NE, batch.var_NE, doubt, batch.previous, batch.horizon_N,
            batch.lead_N, copy_G, terms, rows,
        )  # fmt: skip
        if not costs.is_lines:
            check_layers(start, stop, batch.layer_N, batch.mean_NE, batch.var_NE, doubt, terms, costs.layer_costs, rows)

    in_parallel(some, len(batch), len(batch) * experts * max(1, params.scenarios))
    return rows


def reuse(setting: Setting) -> ReuseTerms:
    """A plan stays while the forecast hardly changes, and a static one while no plan could pay for its dispatch."""
    params, spec = setting.params, setting.spec
    terms = setting.derived(choice_terms)
    return ReuseTerms(
        True, np.zeros((spec.L, spec.E)), np.zeros(spec.L, np.bool_), float(params.keep), terms.normal_CE,
        float(params.decode_doubt), terms.gpu_E, setting.cluster.num_gpus, int(terms.extra), terms.a, terms.b, terms.c,
        terms.skip_L,
    )  # fmt: skip


PLANNER = Planner(
    name="elastic",
    plan_layers=plan_layers,
    dispatch=DISPATCH,
    params=ElasticParams,
    cadence="iteration",
    needs_forecast=True,
    default_predictor="history",
    source="this project: static primaries, extras by scenarios of the forecast, dispatch by chains of copies",
    reuse=reuse,
    timed_as="elastic",
)
