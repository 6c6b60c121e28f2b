"""The page that says how to add a planner: its example, installed as a package's entry point, works everywhere."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from moeless.cluster import cluster
from moeless.contracts import Policy, Request
from moeless.costs import COSTS
from moeless.placement import PLANNERS
from moeless.placement.dispatch import DispatchRule
from moeless.policy import resolve
from moeless.predictors import PREDICTORS
from moeless.simulator import Replay, SimulationSettings, simulate
from moeless.spec import preset
from moeless.workloads.lengths import Workload
from moeless.workloads.schedulers import Continuous

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending" / "planner.md"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's two blocks as an installed package: the module, and the metadata that an installer writes of it."""
    module, project = re.findall(r"```(?:python|toml)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    group, point = re.search(r'entry-points\."(.+?)"\]\n(.+)', project).groups()
    site = tmp_path / "site"
    (site / "busiest-1.0.dist-info").mkdir(parents=True)
    (site / "busiest.py").write_text(module)
    (site / "busiest-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: busiest\nVersion: 1.0\n")
    (site / "busiest-1.0.dist-info" / "entry_points.txt").write_text(f"[{group}]\n{point.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(PLANNERS, "_loaded", dict(PLANNERS._loaded))


def test_the_example_serves_the_same_inside_compiled_loops_and_layer_by_layer(installed: None) -> None:
    spec, where = preset("bundled"), cluster("h100x8").with_gpus(4)
    random = np.random.default_rng(0)
    keys = np.log(1.0 / np.arange(1, spec.E + 1)) + random.gumbel(size=(12 * 40, spec.L, spec.E))
    topk_TLK = np.argsort(-keys, axis=-1)[..., : spec.K].astype(np.uint16)
    requests = tuple(Request(i, 1e-3 * i, 30, 6) for i in range(12))
    runtime = resolve(
        Policy.parse("busiest:history:1"),
        spec=spec,
        cluster=where,
        costs=COSTS.get("roofline")(spec, where),
        extra_slots=1,
        predictors={"history": PREDICTORS.get("history")(spec)},
    )
    assert runtime.planner.dispatch.deal is not None
    rule = runtime.planner.dispatch
    in_python = dataclasses.replace(runtime.planner, dispatch=DispatchRule(rule.gathers_counts, quotas=rule))
    replay = Replay(topk_TLK, Workload(requests, False, (), np.arange(12) * 40), spec.E, where.G)
    compiled, slow = (
        simulate(replay, requests, Continuous(requests, where.G), one, settings=SimulationSettings())
        for one in (runtime, dataclasses.replace(runtime, planner=in_python))
    )
    assert compiled.clocks.completed == 12
    assert compiled.cell.layer.replicas > spec.E + 2
    assert slow.end == pytest.approx(compiled.end, rel=1e-9)
    assert slow.record.tally == pytest.approx(compiled.record.tally, rel=1e-9)


def test_the_example_is_a_planner_of_the_commands(installed: None, cli, tmp_path: Path) -> None:
    trace = Path(__file__).resolve().parents[1] / "fixtures" / "traces" / "tokens"
    status, _, error = cli("plan", trace, "--planner", "busiest", "--out", tmp_path / "plan.json", "--tokens", 64)
    assert status == 0, error
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["planner"] == "busiest"
    assert all(len(layer["expert"]) > plan["num_experts"] for layer in plan["layers"])
