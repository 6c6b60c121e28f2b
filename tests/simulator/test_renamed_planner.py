"""A planner is what it declares: under another name it is charged, kept, dispatched and billed just the same."""

import dataclasses

import numpy as np
import pytest

from moeless.cluster import cluster
from moeless.contracts import Policy, Request
from moeless.costs import COSTS
from moeless.experiments.cells import parts
from moeless.placement import PLANNERS
from moeless.policy import resolve
from moeless.predictors import PREDICTORS
from moeless.simulator import Replay
from moeless.simulator.settings import SimulationSettings
from moeless.simulator.simulation import simulate
from moeless.spec import preset
from moeless.workloads import schedulers
from moeless.workloads.lengths import Workload

SPEC = dataclasses.replace(preset("bundled"), num_layers=3, moe_layers=(0, 1, 2))
BUILT_IN = ("static", "eplb", "eplb-hierarchical", "moeless", "elastic", "elastic-ahead", "metro", "llep", "craft")


def made_up_workload() -> tuple[np.ndarray, list[Request]]:
    """Skewed routing of 24 requests of 60 tokens, five of them decoded."""
    random = np.random.default_rng(0)
    keys = np.log(1.0 / np.arange(1, SPEC.E + 1)) + random.gumbel(size=(24 * 60, SPEC.L, SPEC.E))
    topk_TLK = np.argsort(-keys, axis=-1)[..., : SPEC.K].astype(np.uint16)
    return topk_TLK, [Request(i, 1e-3 * i, 55, 6) for i in range(24)]


def served(planner, costs_name: str, predictor: str = "history") -> dict:
    """The result row of a small workload under the planner, with the warnings it gave."""
    where = cluster("cpu8") if costs_name == "measured" else cluster("h100x8")
    where = where.with_gpus(4)
    topk_TLK, requests = made_up_workload()
    PLANNERS.add(planner.name, planner)
    policy = Policy.parse(planner.name if not planner.needs_forecast else f"{planner.name}:{predictor}")
    runtime = resolve(
        policy,
        spec=SPEC,
        cluster=where,
        costs=COSTS.get(costs_name)(SPEC, where),
        extra_slots=1,
        predictors={"history": PREDICTORS.get("history")(SPEC), "last": PREDICTORS.get("last")(SPEC)},
    )
    replay = Replay(topk_TLK, Workload(tuple(requests), False, (), np.arange(24) * 60), SPEC.E, where.G)
    scheduler = schedulers.build("continuous", requests, where.G, token_budget=512, max_running=8)
    found = simulate(replay, requests, scheduler, runtime, settings=SimulationSettings(replan_seconds=0.01))
    row = dataclasses.asdict(found.cell)
    assert row.pop("policy").split(":")[0] == planner.name
    return row


@pytest.fixture(autouse=True)
def registry_as_before():
    before = dict(PLANNERS._loaded)
    yield
    PLANNERS._loaded.clear()
    PLANNERS._loaded.update(before)


@pytest.mark.parametrize("costs_name", ["paper", "roofline", "measured"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_copy_under_another_name_gives_the_same_results(name, costs_name):
    planner = PLANNERS.get(name)
    renamed = dataclasses.replace(planner, name="renamed")
    assert served(renamed, costs_name) == served(planner, costs_name)


@pytest.mark.parametrize("name", ["moeless", "elastic", "elastic-ahead"])
def test_so_does_a_copy_with_forecasts_that_are_not_history(name):
    planner = PLANNERS.get(name)
    assert served(dataclasses.replace(planner, name="renamed"), "roofline", "last") == served(
        planner, "roofline", "last"
    )


@pytest.mark.parametrize("costs_name", ["roofline", "measured"])
@pytest.mark.parametrize("planner", [parts.CHOSEN, *map(PLANNERS.get, ("milp", "metro", "llep"))], ids=lambda p: p.name)
def test_whoever_gathers_counts_is_charged_for_it(planner, costs_name):
    where = cluster("cpu8" if costs_name == "measured" else "h100x8")
    costs = COSTS.get(costs_name)(SPEC, where)
    elastic, static = PLANNERS.get("elastic").control, PLANNERS.get("static").control
    assert costs.control_seconds(planner.control, 0) >= 0.5 * costs.control_seconds(elastic, 0) > 0.0
    assert costs.control_seconds(static, 0) == 0.0


def test_a_planner_that_brings_a_plain_function_is_charged():
    elastic = PLANNERS.get("elastic")
    plain = dataclasses.replace(elastic, name="plain", dispatch=lambda *given: elastic.dispatch(*given))
    assert plain.control.gathers_counts
    assert plain.dispatch.quotas is not None
