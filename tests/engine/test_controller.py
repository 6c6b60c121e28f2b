"""The controller's forecasts: which layers are asked from where, and that token ids reach the first ones."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moeless.cluster import cluster
from moeless.contracts import AUTO, Forecast, Phase
from moeless.engine.controller import Controller, ControlSettings
from moeless.engine.core import PartTimes
from moeless.engine.policy import resolve_live
from moeless.errors import UserError
from moeless.placement import PLANNERS
from moeless.policy import LoadHistory
from moeless.policy.history import WINDOW
from moeless.predictors import LoadPredictor
from moeless.traces.specs import resolve_spec

TOKENS = np.array([3, 1, 4, 1, 5, 9])
#: Of the copies of up to 64 experts that are complete, or on their way.
HELD_WORDS = 2


class Asked(LoadPredictor):
    """Forecasts tokens on expert 0 alone with a skill that fades, and notes what it was asked."""

    name, reads, forecasts_first = "asked", "topk", True

    def __init__(self, spec):
        self.spec, self.calls = spec, []

    def skill(self, layer, distance, phase, tokens):
        return 0.0 if layer < 0 else 0.5**distance

    def predict(self, context, layer, distance):
        self.calls.append((layer, distance, context.tokens, context.token_T))
        mean_E = np.eye(self.spec.E)[0] * context.tokens * self.spec.K
        return Forecast(mean_E, np.full(self.spec.E, 0.5), context.tokens, self.name)


class TwoRanks:
    """Collectives of rank 0 whose peer says the same."""

    ranks = SimpleNamespace(rank=0, world=2, device=torch.device("cpu"))
    gathers = 0

    def __init__(self):
        self.sent = []

    def gather(self, words):
        self.gathers += 1
        self.sent.append(words)
        return np.stack([words, words])


class Store:
    """Holds every expert."""

    def __init__(self, experts):
        self.experts = experts

    def deploy(self, *_):
        pass

    def provision(self, *_):
        pass

    def held(self, layer):
        return np.ones(self.experts, np.bool_), np.zeros(self.experts, np.bool_)

    def ready(self, layer, expert):
        return True


@pytest.fixture
def run(tiny):
    """Run iterations of a policy at a distance; gives the predictor, the controller and its plans asked for."""
    spec = dataclasses.replace(resolve_spec(str(tiny("mixtral"))), dtype="float32", expert_dtype="float32")
    spec = dataclasses.replace(spec, moe_layers=tuple(range(5)), num_layers=5)
    policy = resolve_live(
        "moeless:history:1",
        spec=spec,
        cluster=cluster("cpu8").with_gpus(2),
        costs="roofline",
        extra_slots=1,
        model=tiny("mixtral"),
    )

    def go(distance, iterations=1, reads="topk"):
        asked = Asked(spec)
        asked.reads = reads
        chosen = dataclasses.replace(policy.policy, predictor="asked", distance=distance)
        mine = dataclasses.replace(policy, predictor=asked, policy=chosen)
        controller = Controller(mine, TwoRanks(), Store(spec.E), ControlSettings())
        planned = []
        plan = controller._plan
        controller._plan = lambda layer, forecast, *rest: (
            planned.append((layer, forecast)),
            plan(layer, forecast, *rest),
        )
        topk_TK = torch.arange(len(TOKENS) * spec.K).reshape(len(TOKENS), spec.K) % spec.E
        for _ in range(iterations):
            asked.calls.clear()
            planned.clear()
            controller.begin(Phase.PREFILL, 2 * len(TOKENS), 0.0, TOKENS)
            controller.times = [PartTimes() for _ in range(spec.L)]
            for layer in range(spec.L):
                controller.decide(layer, torch.zeros(len(TOKENS), spec.hidden_size), topk_TK, controller.times[layer])
        controller.close()
        return asked, controller, planned

    return go


def test_first_layers_are_forecast_from_token_ids_and_ranks_add_up(run):
    asked, controller, planned = run(2)
    first, later = [call for call in asked.calls if call[0] < 0], [call for call in asked.calls if call[0] >= 0]
    assert [call[:3] for call in first] == [(-2, 2, 6), (-1, 2, 6)]
    assert all(call[3] is TOKENS for call in first)
    assert [call[:2] for call in later] == [(0, 2), (1, 2), (2, 2)]
    assert controller.exchange.gathers == 1 + 5
    assert [layer for layer, _ in planned] == [0, 1, 2, 3, 4]
    for _, forecast in planned:
        assert forecast.mean_E[0] == 2 * len(TOKENS) * asked.spec.K
        assert forecast.var_E.tolist() == [1.0] * asked.spec.E


def test_forecasts_of_later_layers_are_made_beside_the_experts_and_told_by_the_next_gather(run):
    _, controller, _ = run(2)
    assert [len(words) for words in controller.exchange.sent[-5:]] == [
        controller.spec.E * (1 + 2 * told) + HELD_WORDS for told in (0, 1, 1, 1, 0)
    ]
    beside = [times.forecast_beside > 0 for times in controller.times]
    assert beside == [False, True, True, True, False]
    assert [times.forecast_beside_wait > 0 for times in controller.times] == beside


def test_what_past_loads_tell_is_not_sent(run):
    asked, controller, planned = run(1, reads="nothing")
    assert {len(words) for words in controller.exchange.sent[1:]} == {controller.spec.E + HELD_WORDS}
    assert [call[:3] for call in asked.calls if call[0] >= 0] == [(layer, 1, 2 * len(TOKENS)) for layer in range(4)]
    assert [layer for layer, _ in planned] == [0, 1, 2, 3, 4]


def test_auto_goes_by_the_layer_times_that_ranks_tell_each_other(run):
    asked, controller, planned = run(AUTO)
    # nothing was known of layer times: the farthest there is
    assert [call[:2] for call in asked.calls if call[0] >= 0] == [(0, 4)]
    assert sorted(layer for layer, _ in planned) == [0, 1, 2, 3, 4]
    # layers take some time and copies none: one layer ahead
    controller.rule.prepare_seconds = 0.0
    assert controller.rule.choose(Phase.PREFILL, 12).tolist() == [1, 1, 1, 1, 1]
    # copies that take for ever are planned before the iteration
    controller.rule.prepare_seconds = 1e9
    assert controller.rule.choose(Phase.PREFILL, 12).tolist() == [1, 2, 3, 4, 5]
    # what was told of no phase is not known
    assert controller.rule.choose(Phase.DECODE, 12).tolist() == [1, 2, 3, 4, 4]


def test_auto_needs_a_fitted_skill(tiny):
    spec = dataclasses.replace(resolve_spec(str(tiny("mixtral"))), dtype="float32", expert_dtype="float32")
    with pytest.raises(UserError, match="not fitted at distance 1"):
        resolve_live(
            "moeless:last:auto",
            spec=spec,
            cluster=cluster("cpu8").with_gpus(2),
            costs="roofline",
            extra_slots=1,
            model=tiny("mixtral"),
        )


def test_recent_loads_are_those_of_the_last_iterations():
    history, loads = LoadHistory(None, 2, 3, 1), np.random.default_rng(0).integers(0, 9, (WINDOW + 20, 3))
    assert history.recent(1) is None
    for count, load_E in enumerate(loads, start=1):
        history.add_layer(1, load_E, Phase.DECODE, 9)
        assert history.recent(1).tolist() == loads[max(0, count - WINDOW) : count].sum(0).tolist()


@pytest.fixture
def decided(tiny):
    """What the controller decides in some iterations of skewed tokens under a planner: plans, quotas, copies warm."""
    spec = dataclasses.replace(resolve_spec(str(tiny("mixtral"))), dtype="float32", expert_dtype="float32")
    spec = dataclasses.replace(spec, moe_layers=tuple(range(3)), num_layers=3)

    def go(planner):
        PLANNERS.add(planner.name, planner)
        text = f"{planner.name}:history" if planner.needs_forecast else planner.name
        policy = resolve_live(
            text, spec=spec, cluster=cluster("cpu8").with_gpus(2), costs="roofline", extra_slots=1,
            model=tiny("mixtral"),
        )  # fmt: skip
        controller = Controller(policy, TwoRanks(), Store(spec.E), ControlSettings(replan_seconds=0.5))
        random, found = np.random.default_rng(0), []
        for iteration in range(6):
            controller.begin(Phase.DECODE, 80, float(iteration), None)
            for layer in range(spec.L):
                shares_E = 1.0 / np.arange(1, spec.E + 1)
                ids = random.choice(spec.E, (40, spec.K), p=shares_E / shares_E.sum())
                decision = controller.decide(
                    layer, torch.zeros(40, spec.hidden_size), torch.from_numpy(ids), PartTimes()
                )
                found.append((decision.plan.to_json(), decision.quota_SR.tolist(), decision.warm))
        controller.close()
        return found

    before = dict(PLANNERS._loaded)
    yield go
    PLANNERS._loaded.clear()
    PLANNERS._loaded.update(before)


@pytest.mark.parametrize("name", sorted({*PLANNERS._targets} - {"milp"}))
def test_a_planner_under_another_name_decides_the_same_live(name, decided):
    planner = PLANNERS.get(name)
    mine = decided(planner)
    assert decided(dataclasses.replace(planner, name="renamed")) == mine
    if planner.holds_extras:
        assert any(len(plan["expert"]) > len(set(plan["expert"])) for plan, _, _ in mine) or name.startswith("elastic")
