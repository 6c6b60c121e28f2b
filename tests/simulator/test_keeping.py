"""Plans that a new forecast leaves as they are."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import Forecast, Phase, Policy
from moeless.costs import COSTS
from moeless.placement.keep_kernels import hardly_changed
from moeless.policy import resolve
from moeless.predictors import PREDICTORS
from moeless.serverless import PoolSettings
from moeless.simulator import SimulationSettings, simulate
from moeless.simulator.keeping import Keeping
from moeless.simulator.timeline import Timeline
from moeless.spec import Attention, MoESpec
from moeless.workloads.schedulers import Continuous

SPEC = MoESpec(
    name="wide",
    hidden_size=1024,
    num_layers=2,
    moe_layers=(0, 1),
    num_experts=8,
    top_k=2,
    expert_intermediate_size=2048,
    attention=Attention(heads=4, kv_heads=2, head_dim=64),
    vocab_size=100,
)


def runtime_for(spec, costs="roofline", **params):
    where = cluster("h100x8").with_gpus(4)
    return resolve(
        Policy.parse("elastic:history:1"),
        spec=spec,
        cluster=where,
        costs=COSTS.get(costs)(spec, where),
        extra_slots=1,
        predictors={"history": PREDICTORS.get("history")(spec)},
        params=params,
    )


class OneStepAtATime:
    """A scheduler that hides that its decode steps repeat."""

    def __init__(self, inner):
        self.next, self.complete, self.next_arrival = inner.next, inner.complete, inner.next_arrival


@pytest.mark.parametrize("costs", ["paper", "roofline"])
def test_runs_that_keep_plans_are_the_same_compiled_stepped_and_watched(costs, spec, requests, replay_for):
    def run(hide, timeline):
        scheduler = Continuous(requests, 4, token_budget=64, max_running=8)
        return simulate(
            replay_for(4),
            requests,
            OneStepAtATime(scheduler) if hide else scheduler,
            runtime_for(spec, costs, skip=costs == "roofline"),
            settings=SimulationSettings(PoolSettings(instant=True)),
            timeline=timeline,
        )

    fast, stepped, watched = run(False, None), run(True, None), run(False, Timeline(0.0, 1e9))
    for other in (stepped, watched):
        assert other.record.times_IL == pytest.approx(fast.record.times_IL, rel=1e-6)
        assert other.end == pytest.approx(fast.end, rel=1e-9)
        assert dataclasses.asdict(other.cell.billing) == pytest.approx(dataclasses.asdict(fast.cell.billing), rel=1e-6)


def test_only_changes_up_to_the_tolerance_keep_a_plan():
    planned = np.array([50.0, 30.0, 20.0])
    assert hardly_changed(np.array([52.0, 28.0, 20.0]), planned, 0.05)
    assert not hardly_changed(np.array([53.0, 27.0, 20.0]), planned, 0.05)
    assert not hardly_changed(1.1 * planned, planned, 0.05)
    assert not hardly_changed(np.zeros(3), np.zeros(3), 0.05)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 30, 400, 6000, 60_000]))
def test_a_static_plan_is_kept_exactly_where_the_planner_would_skip_by_its_bound(seed, assignments):
    random = np.random.default_rng(seed)
    runtime = runtime_for(SPEC, keep=0.0)
    keeping = Keeping(runtime)
    weight_LE = random.gamma(0.5, 1.0, (2, 8))
    static = runtime.plan(0, Phase.DECODE, Forecast(np.zeros(8), np.zeros(8), 0, "none"))
    for layer in range(2):
        keeping.note(layer, np.zeros(8), static)
    kept_L = keeping.kept(weight_LE, assignments)
    for layer in range(2):
        mean_E = weight_LE[layer] / weight_LE[layer].sum() * assignments
        plan = runtime.plan(layer, Phase.DECODE, Forecast(mean_E, mean_E.copy(), assignments // 2, "history"))
        if kept_L[layer]:
            assert plan.num_extra == 0
    keeping.forget()
    assert not keeping.kept(weight_LE, assignments).any()


def test_other_planners_and_forecasts_are_always_asked(spec):
    where = cluster("h100x8").with_gpus(4)
    for policy in ("moeless:history:1", "elastic:last:1"):
        runtime = resolve(
            Policy.parse(policy),
            spec=spec,
            cluster=where,
            costs=COSTS.get("roofline")(spec, where),
            extra_slots=1,
            predictors={name: PREDICTORS.get(name)(spec) for name in ("history", "last")},
        )
        assert not Keeping(runtime).active
