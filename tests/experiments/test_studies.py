"""The studies beyond the paper: their own cells, and that they leave what they do not study as it is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moeless.cluster import cluster
from moeless.contracts import Budget, Forecast, Phase, PlanInput, Policy, Request
from moeless.costs import COSTS
from moeless.experiments import claims, serving
from moeless.experiments.cells import parts
from moeless.experiments.cells.scale import serve
from moeless.experiments.cells.serving import in_blocks
from moeless.placement.layout import static_gpu_E
from moeless.placement.setting import Setting
from moeless.policy import resolve
from moeless.predictors import PREDICTORS
from moeless.spec import preset
from moeless.workloads.lengths import Workload


def planned(previous=None, **params):
    spec, where = preset("phi-3.5-moe"), cluster("h100x8")
    mean_E = np.arange(16, dtype=np.float64) ** 2
    budget = Budget.even(spec.E, where.G, 1, spec.expert_bytes)
    setting = Setting(spec, where, COSTS.get("roofline")(spec, where), budget, parts.PartsParams(**params))
    x = PlanInput(0, Phase.DECODE, Forecast(mean_E, mean_E, 620, "test"), previous, None, 1)
    return parts.EVEN.plan(x, setting)


def test_without_placement_primaries_stay_and_copies_go_to_gpus_in_turn():
    plan = planned(place=False, reuse=False)
    primary_E = np.empty(16, np.int64)
    primary_E[plan.expert_R[plan.primary_R]] = plan.gpu_R[plan.primary_R]
    assert (primary_E == static_gpu_E(16, 8)).all()
    copies_G = np.bincount(plan.gpu_R[~plan.primary_R], minlength=8)
    assert copies_G.sum() > 0
    assert copies_G.max() - copies_G.min() <= 1


def test_without_reuse_a_plan_does_not_depend_on_the_one_before():
    other = planned(place=False)
    assert (planned(previous=other, reuse=False).gpu_R == planned(reuse=False).gpu_R).all()
    kept = planned(previous=other)
    assert not np.array_equal(kept.gpu_R, planned().gpu_R) or not np.array_equal(kept.expert_R, planned().expert_R)


def test_blocks_keep_requests_rows_and_arrivals_and_order_domains():
    random = np.random.default_rng(0)
    requests = tuple(
        Request(
            i, 0.5 * i, int(random.integers(1, 9)), 3, trace_request=int(random.integers(50)), category="cba"[i % 3]
        )
        for i in range(12)
    )
    before = Workload(requests, False, (), random.integers(0, 1000, 12))
    after = in_blocks(before)

    def content(workload):
        return sorted(
            (dataclasses.replace(r, id=0, arrival=0.0).__repr__(), int(workload.base_N[r.id]))
            for r in workload.requests
        )

    assert content(after) == content(before)
    assert [r.arrival for r in after.requests] == [r.arrival for r in before.requests]
    assert [r.id for r in after.requests] == list(range(12))
    assert [r.category for r in after.requests] == sorted(r.category for r in requests)


@pytest.mark.parametrize("gpus", [8, 16])
def test_a_growing_cluster_is_served_whole_and_labelled_synthetic(gpus):
    params = {
        "model": "mixtral-8x7b",
        "layers": 1,
        "gpus": gpus,
        "requests_per_gpu": 2,
        "prompt_tokens": 3,
        "output_tokens": 2,
        "policy": "elastic:history",
        "costs": "roofline",
        "extra_slots": 1,
        "plan_every": 1,
        "seed": 0,
    }
    data = serve(params, [])
    assert data["evidence"] == "synthetic"
    assert data["request"]["completed"] == 2 * gpus
    assert data == serve(params, [])
    first, later = (data["settings"][name] for name in ("first_ms", "later_ms"))
    assert min(first, later) < data["layer"]["mean_ms"] < max(first, later)


def test_elastic_starts_with_copies_on_many_gpus_and_as_before_on_few():
    spec = dataclasses.replace(preset("deepseek-v3"), num_layers=1, moe_layers=(0,))
    share_E = np.arange(1, spec.E + 1) ** -0.5
    extras = []
    for where in (cluster("h100x8x8"), cluster("h100x8x16")):
        costs = COSTS.get("roofline")(spec, where)
        runtime = resolve(
            Policy.parse("elastic:history"), spec=spec, cluster=where, costs=costs, extra_slots=1,
            predictors={"history": PREDICTORS.get("history")(spec)},
        )  # fmt: skip
        (plan,) = runtime.first_plans([share_E / share_E.sum()])
        extras.append(plan.R - spec.E)
    # twice the GPUs, twice the tokens: about twice the copies
    assert extras[1] > 1.5 * extras[0] > 0


def test_what_the_papers_means_imply_composes_back_to_them():
    implied = claims.implied()
    mine = implied["MoEless latency"] * implied["MoEless memory"]
    assert 100 * (mine - 1) == pytest.approx(-92.68)
    assert 100 * (mine / (implied["EPLB latency"] * implied["EPLB memory"]) - 1) == pytest.approx(-95.11)
    assert 100 * (mine / implied["Oracle latency"] - 1) == pytest.approx(-84.06)
    assert 100 * (implied["MoEless latency"] / implied["EPLB latency"] - 1) == pytest.approx(-21.89)


def test_claims_are_told_with_paired_intervals_and_the_codes_revision(monkeypatch):
    monkeypatch.setattr(claims, "POLICIES", (("static", 1), ("eplb:history", 1)))
    rows = claims.run_model("phi-3.5-moe", 3, "one-second", 1.0)
    text = claims.document(rows, "a command", {"revision": "abc", "dirty": True})
    assert "Code: abc, changed. Requests: phi-3.5-moe 3 (" in text
    for name in ("static", "eplb:history"):
        # every system has its row, the baselines too
        assert any(f"| roofline | {name} |" in line for line in text.partition("## How sure")[0].splitlines())
    line = next(line for line in claims.certain(rows).splitlines() if "| paper | eplb:history |" in line)
    change, against_itself, bill = (part.strip() for part in line.split("|")[4:7])
    assert against_itself == "–"
    for told, field in ((change, "layer.mean_ms"), (bill, "billing.paper")):
        middle, low, high = (
            float(part) for part in told.replace("−", "-").replace("[", "").replace("]", "").replace(",", "").split()
        )
        assert low <= middle <= high
        static, eplb = (serving.read(row, field) for row in rows[:2])
        assert middle == pytest.approx(100 * (eplb / static - 1), abs=0.06)
