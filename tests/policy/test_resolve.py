"""A policy is the same object for the simulator and for a live run."""

import numpy as np
import pytest

from moeless.cluster import cluster
from moeless.contracts import Phase, Policy
from moeless.costs import COSTS
from moeless.engine.policy import resolve_live
from moeless.errors import UserError
from moeless.placement import PLANNERS
from moeless.policy import LoadHistory, SimulationPredictors, resolve
from moeless.spec import preset

SPEC = preset("bundled")
POLICIES = (
    *("oracle", "static", "eplb:history", "eplb-hierarchical:history", "metro", "llep", "craft"),
    *("moeless:history", "moeless:last:2", "moeless:window", "elastic", "elastic:window:3", "elastic-ahead:last"),
)


def both(text, gpus=4, extra_slots=1):
    """The policy as the simulator resolves it and as a live run does."""
    where = cluster("cpu8").with_gpus(gpus)
    simulated = resolve(
        Policy.parse(text),
        spec=SPEC,
        cluster=where,
        costs=COSTS.get("roofline")(SPEC, where),
        extra_slots=extra_slots,
        predictors=SimulationPredictors(SPEC, (), False),
    )
    live = resolve_live(text, spec=SPEC, cluster=where, costs="roofline", extra_slots=extra_slots, model=None)
    return simulated, live


def same(plan, other):
    for row in ("expert_R", "gpu_R", "primary_R"):
        np.testing.assert_array_equal(getattr(plan, row), getattr(other, row))
    assert (plan.share_R is None) == (other.share_R is None)
    if plan.share_R is not None:
        np.testing.assert_array_equal(plan.share_R, other.share_R)


@pytest.mark.parametrize("extra_slots", [0, 2])
@pytest.mark.parametrize("text", POLICIES)
def test_plans_and_quotas_from_equal_loads_are_equal(text, extra_slots):
    simulated, live = both(text, extra_slots=extra_slots)
    assert (simulated.label, simulated.policy, simulated.params) == (live.label, live.policy, live.params)
    assert simulated.budget.slots_G.tolist() == live.budget.slots_G.tolist()
    whole, parts = (LoadHistory(None, SPEC.L, SPEC.E, SPEC.K) for _ in range(2))
    random = np.random.default_rng(0)
    for _ in range(70):
        load_LE = random.multinomial(64 * SPEC.K, 1.0 / np.arange(1, SPEC.E + 1) / 3.3807, SPEC.L)
        whole.add(load_LE, Phase.DECODE, 64)
        for layer in range(SPEC.L):
            parts.add_layer(layer, load_LE[layer], Phase.DECODE, 64)
    load_SE = random.poisson(9.0, (4, SPEC.E))
    shared = simulated.planner.share_budget is not None
    if not shared:
        # a live engine has as many slots in every layer
        for first, other in zip(simulated.first_plans(), live.first_plans(), strict=True):
            same(first, other)
    for layer in range(1, SPEC.L, 3):
        told = []
        for one, history in ((simulated, whole), (live, parts)):
            forecast = one.from_share(history.share(layer), 64)
            if one.predictor is not None:
                context = history.context(layer, 64, Phase.DECODE)
                forecast = one.predictor.predict(context, layer - 1, 1)
            told.append(forecast)
        np.testing.assert_array_equal(told[0].mean_E, told[1].mean_E)
        plans = [one.plan(layer, Phase.DECODE, forecast) for one, forecast in zip((simulated, live), told, strict=True)]
        same(*plans)
        usable_R = np.ones(plans[0].R, np.bool_)
        quotas = [one.dispatch(load_SE, plan, usable_R) for one, plan in zip((simulated, live), plans, strict=True)]
        np.testing.assert_array_equal(*quotas)


@pytest.mark.parametrize("gpus", [8, 64, 128])
def test_first_plans_are_meant_for_as_many_tokens_on_both_sides(gpus):
    simulated, live = both("elastic", gpus)
    for first, other in zip(simulated.first_plans(), live.first_plans(), strict=True):
        same(first, other)


def test_a_planner_without_extras_has_no_room_for_them():
    for one in both("static", extra_slots=3):
        assert one.budget.max_extra == 0


def test_every_built_in_planner_is_compared():
    known = {Policy.parse(text).planner for text in POLICIES} - {"oracle"}
    # an exact optimum takes minutes at this size
    assert set(PLANNERS._targets) - known == {"milp"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("oracle:history", "takes no predictor"),
        ("static:history", "needs no forecast"),
        ("eplb:last", "plans at intervals from history"),
        ("moeless:last:auto", "not fitted at distance 1"),
        ("elastic:blend", "must be fitted first"),
        ("elastic:nobody", "no predictor is called 'nobody'"),
    ],
)
def test_both_sides_refuse_a_policy_in_the_same_words(text, sentence):
    with pytest.raises(UserError, match=sentence) as simulated:
        both(text)
    with pytest.raises(UserError, match=sentence) as live:
        resolve_live(text, spec=SPEC, cluster=cluster("cpu8").with_gpus(4), costs="roofline", extra_slots=1, model=None)
    assert str(simulated.value) == str(live.value)
