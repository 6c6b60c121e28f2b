"""Distance ``auto``: near where a replica is prepared at once, before the iteration where nothing is in time."""

import pytest

from moeless.cluster import cluster
from moeless.contracts import Policy
from moeless.costs import COSTS
from moeless.errors import UserError
from moeless.policy import resolve
from moeless.predictors import PREDICTORS, LoadPredictor
from moeless.serverless import PoolSettings
from moeless.simulator import SimulationSettings, simulate
from moeless.workloads.schedulers import Continuous


class Asked(LoadPredictor):
    """History's forecast, with a skill that fades; notes from which distances it was asked."""

    name = "asked"

    def __init__(self, spec):
        self.spec, self.history, self.distances = spec, PREDICTORS.get("history")(spec), []

    def skill(self, layer, distance, phase, tokens):
        return 0.0 if layer < 0 else 0.5**distance

    def predict(self, context, layer, distance):
        self.distances.append(distance)
        return self.history.predict(context, layer, distance)


def run(spec, requests, replay, instant, policy="moeless:asked:auto"):
    where, asked = cluster("h100x8").with_gpus(4), Asked(spec)
    costs = COSTS.get("paper" if instant else "roofline")(spec, where)
    predictors = {"asked": asked, "history": asked.history}
    runtime = resolve(
        Policy.parse(policy), spec=spec, cluster=where, costs=costs, extra_slots=2, predictors=predictors
    )  # fmt: skip
    settings = SimulationSettings(pool=PoolSettings(instant=instant))
    made = simulate(replay, requests, Continuous(requests, 4, token_budget=64), runtime, settings=settings)
    return made.cell, asked.distances


def test_copies_that_take_no_time_are_planned_one_layer_ahead(spec, requests, replay_for):
    cell, distances = run(spec, requests, replay_for(4), True)
    assert cell.policy == "moeless:asked:auto"
    assert distances.count(1) > 0.9 * len(distances) > 0


def test_copies_that_take_longer_than_all_layers_are_planned_before_the_iteration(spec, requests, replay_for):
    _, near = run(spec, requests, replay_for(4), True)
    _, late = run(spec, requests, replay_for(4), False)
    # what is left are the first iterations of each phase, before any layer has shown its time
    assert len(late) < 0.2 * len(near)


def test_a_predictor_that_was_not_measured_has_no_automatic_distance(spec, requests, replay_for):
    with pytest.raises(UserError, match="distance auto"):
        run(spec, requests, replay_for(4), True, "moeless:history:auto")
