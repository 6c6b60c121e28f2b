"""Plans and dispatches without numba equal the compiled ones, and the live engine's imports do not need it."""

import json
import subprocess
import sys

import numpy as np
import pytest

ABSENT = "numba scipy pydantic typer rich pyarrow megatron datasets wandb optuna yaml matplotlib jinja2 triton"
NAMES = ("static", "eplb", "moeless", "elastic")


def plans():
    """What each planner decides for one layer of gpt-oss-20b's shapes."""
    from moeless.cluster import cluster
    from moeless.contracts import Budget, Forecast, Phase, PlanInput
    from moeless.costs.roofline import RooflineCosts
    from moeless.placement import PLANNERS
    from moeless.placement.setting import Setting
    from moeless.spec import preset

    spec, machine = preset("gpt-oss-20b"), cluster("h100x8").with_gpus(4)
    costs = RooflineCosts(spec, machine)
    mean_E = 4096.0 * spec.K / spec.E * np.exp(np.random.default_rng(1).normal(0, 0.6, spec.E))
    load_SE = np.random.default_rng(2).poisson(np.tile(mean_E / 4, (4, 1))).astype(np.int64)
    found = {}
    for name in NAMES:
        planner = PLANNERS.get(name)
        setting = Setting(spec, machine, costs, Budget.even(spec.E, 4, 1, spec.expert_bytes), planner.params())
        ahead = PlanInput(0, Phase.PREFILL, Forecast(mean_E, mean_E, 4096, "made"))
        plan = planner.plan(ahead, setting)
        quota_SR = planner.dispatch(load_SE, plan, np.ones(plan.R, np.bool_), setting)
        found[name] = [plan.expert_R.tolist(), plan.gpu_R.tolist(), quota_SR.tolist()]
    return found


@pytest.fixture(scope="module")
def plain():
    """The same from a Python that has torch, numpy and safetensors only."""
    ended = subprocess.run([sys.executable, __file__], check=True, capture_output=True, text=True)
    return json.loads(ended.stdout)


@pytest.fixture(scope="module")
def compiled():
    return plans()


@pytest.mark.parametrize("name", NAMES)
def test_plain_and_compiled_planners_agree(plain, compiled, name):
    assert plain[name] == compiled[name]
    experts, _, quota_SR = plain[name]
    assert (len(experts) == 32) == (name == "static")
    assert sum(map(sum, quota_SR)) > 0


if __name__ == "__main__":
    for module in ABSENT.split():
        sys.modules[module] = None
    from moeless.jit import COMPILED

    assert not COMPILED
    sys.stdout.write(json.dumps(plans()))
