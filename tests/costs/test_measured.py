import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import Budget, Forecast, LayerPlan, Phase, PlanInput
from moeless.costs import COSTS
from moeless.costs.measured import MeasuredCosts, linear_terms
from moeless.costs.profile_reader import FIELDS, load_profile, parse_profile
from moeless.errors import UserError
from moeless.placement import PLANNERS, elastic
from moeless.placement.setting import Setting
from moeless.profiling.monotone import monotone_grid
from moeless.spec import preset

SPEC = preset("gpt-oss-20b")
TOKENS = [1, 2, 4, 8, 16, 64, 256, 1024]
ACTIVE = [1, 2, 4, 6]
CURVE = {"tokens": [1, 4096], "seconds": [1e-6, 1e-6]}


def document(seconds_AN, exchange=(), links=None, spec=SPEC):
    """A profile whose permute and combine take 1 µs each, whatever the tokens."""
    return {
        "format": 1,
        "kind": "hardware-profile",
        "name": "made",
        "created": "2026-01-01T00:00:00Z",
        "program": {},
        "machine": {"device": "cuda", "name": "made GPU"},
        "model": {
            key: getattr(spec, key)
            for key in ("name", "hidden_size", "expert_intermediate_size", "expert_matrices", "num_experts", "top_k")
        },
        "ceilings": {},
        "default_kernel": "grouped_mm",
        "default_dtype": "bfloat16",
        "experts": [
            {
                "kernel": "grouped_mm",
                "dtype": "bfloat16",
                "tokens": TOKENS,
                "active": ACTIVE,
                "seconds": np.asarray(seconds_AN).tolist(),
                "leave_one_out": {},
            }
        ],
        "parts": dict.fromkeys(("router", "attention", "permute", "combine"), CURVE),
        "copies": {"host_to_device_pinned": {"bytes": [1000, 2000], "seconds": [1e-6, 2e-6]}},
        "overlap": None,
        "exchange": list(exchange),
        "links": links,
        "control": {"dispatch_seconds": {"elastic": 7e-6}, "plan_seconds": {"elastic": 9e-6}},
    }


@st.composite
def grids(draw):
    """Random valid grids: steps of at least 0 from every cell to the upper right."""
    steps = draw(
        st.lists(st.floats(0, 1e-4), min_size=len(ACTIVE) * len(TOKENS), max_size=len(ACTIVE) * len(TOKENS)).map(
            lambda values: np.array(values).reshape(len(ACTIVE), len(TOKENS))
        )
    )
    steps[0, 0] += 1e-6
    return steps.cumsum(0).cumsum(1)


def costs_of(seconds_AN, gpus=2, **more):
    profile = parse_profile(document(seconds_AN, **more), "made.json")
    return MeasuredCosts(SPEC, cluster("h100x8").with_gpus(gpus), profile=profile)


loads = st.lists(st.integers(0, 3000), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(grids(), loads, st.data())
def test_a_token_or_an_active_expert_more_never_takes_less_time(grid, tokens, data):
    costs = costs_of(grid)
    at = data.draw(st.integers(0, len(tokens) - 1))
    more = list(tokens)
    more[at] += data.draw(st.integers(1, 500))
    gpu = np.zeros(len(tokens), np.int64)
    before = costs.grouped_seconds(np.array(tokens), gpu)[0]
    after = costs.grouped_seconds(np.array(more), gpu)[0]
    assert after >= before - 1e-12 * grid.max()


@settings(max_examples=60, deadline=None)
@given(grids(), st.sampled_from(range(len(ACTIVE))), st.sampled_from(range(len(TOKENS))), st.integers(0, 3))
def test_grid_points_give_the_measured_time(grid, a, n, idle):
    costs = costs_of(grid)
    tokens = np.array([TOKENS[n]] * ACTIVE[a] + [0] * idle)
    got = costs.grouped_seconds(tokens, np.ones(len(tokens), np.int64))
    assert got == pytest.approx([0.0, grid[a, n]], rel=1e-9, abs=0)
    assert not [warning for warning in costs.warnings if "extrapolated" in warning]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 1024), min_size=1, max_size=6), st.floats(1e-9, 1e-6), st.floats(1e-7, 1e-5))
def test_unequal_loads_are_exact_for_experts_one_after_another_and_all_at_once(tokens, slope, floor):
    # both laws are linear between grid points only where the floor ends on one
    bend = 16
    single = np.maximum(np.array(TOKENS) * slope, bend * slope) + floor
    each = np.array([max(n * slope, bend * slope) + floor if n else 0.0 for n in tokens])
    gpu = np.zeros(len(tokens), np.int64)
    serial = costs_of(np.outer(ACTIVE, single)).grouped_seconds(np.array(tokens), gpu)[0]
    parallel = costs_of(np.tile(single, (len(ACTIVE), 1))).grouped_seconds(np.array(tokens), gpu)[0]
    assert serial == pytest.approx(each.sum(), rel=1e-9)
    assert parallel == pytest.approx(each.max(), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 0.4))
def test_a_noisy_grid_made_monotone_is_accepted_and_a_monotone_one_is_kept(seed, noise):
    random = np.random.default_rng(seed)
    law = 3e-6 + np.outer(ACTIVE, np.maximum(np.array(TOKENS) * 1e-7, 1e-6))
    made = monotone_grid(law * np.exp(noise * random.standard_normal(law.shape)))
    costs_of(made)
    assert monotone_grid(law) == pytest.approx(law, rel=1e-9)


def test_linear_terms_recover_a_roofline():
    law = 3e-6 + np.outer(ACTIVE, np.maximum(np.array(TOKENS) * 7e-8, 16 * 7e-8))
    token, floor, launch = linear_terms(costs_of(law).grid)
    assert (token, floor, launch) == pytest.approx((7e-8, 16 * 7e-8, 3e-6), rel=0.03)


def test_layer_time_is_the_slowest_gpu_with_its_permutation():
    law = np.outer(ACTIVE, np.maximum(np.array(TOKENS) * 1e-7, 1e-6))
    costs = costs_of(law)
    plan = LayerPlan.build(0, [0, 1, 2, 0], [0, 0, 1, 1], [True, True, True, False], num_experts=3, num_gpus=2)
    quota_SR = np.array([[8, 4, 0, 100], [8, 4, 0, 156]])
    time = costs.layer_seconds(quota_SR, plan)
    # GPU 0 holds experts 0 and 1 of 16 and 8 tokens, GPU 1 the copy of expert 0 with 256
    assert time.expert == pytest.approx(max(law[0, 4] * 2 - 0.6e-6, law[0, 6]) + 2e-6)
    assert time.expert == pytest.approx(256e-7 + 2e-6)


def test_extrapolation_is_flagged():
    costs = costs_of(np.outer(ACTIVE, np.maximum(np.array(TOKENS) * 1e-7, 1e-6)))
    assert costs.warnings == (
        "no exchange was measured: the stated links of cluster h100x8@2 are taken",
        "profile made has no times of a source rank's sorting and adding up (it was made by an older program): "
        "they count as none",
        "experts stored as mxfp4 are timed as bfloat16",
    )
    seconds = costs.grouped_seconds(np.array([2048] * 7), np.zeros(7, np.int64))[0]
    assert seconds == pytest.approx(7 * 2048e-7)
    assert costs.warnings[3:] == (
        "more than 6 active experts on a GPU are extrapolated",
        "more than 1024 tokens per expert are extrapolated",
    )


EXCHANGE = {
    "ranks": 2,
    "backend": "nccl",
    "bytes": [1000, 3000],
    "seconds": [1e-5, 3e-5],
    "hot_seconds": [1e-5, 2e-5],
    "gather_seconds": 4e-6,
}


def test_exchange_follows_bytes_and_skew():
    law = np.outer(ACTIVE, np.array(TOKENS) * 1e-7)
    costs = costs_of(law, exchange=[EXCHANGE])
    even = costs.all_to_all_seconds(np.array([[9e9, 3000.0], [3000.0, 9e9]]))
    hot = costs.all_to_all_seconds(np.array([[9e9, 0.0], [3000.0, 9e9]]))
    between = costs.all_to_all_seconds(np.array([[0, 1500.0], [3000.0, 0]]))
    assert (even, hot, between) == pytest.approx((2 * 3e-5, 2 * 2e-5, 2 * 2.5e-5))
    assert costs.control_seconds(PLANNERS.get("elastic").control, 0) == pytest.approx(11e-6)
    assert costs.control_seconds(PLANNERS.get("static").control, 0) == 0.0
    assert costs.background_seconds(PLANNERS.get("elastic").control) == pytest.approx(10e-6)
    assert costs.load_seconds(1500, "host", 0) == pytest.approx(1.5e-6)
    assert costs.load_seconds(1500, "local", 0) == 0.0


def test_what_a_source_rank_does_around_the_exchange_is_added():
    made = document(np.outer(ACTIVE, np.array(TOKENS) * 1e-7), exchange=[EXCHANGE])
    made["parts"] = made["parts"] | {"source": {"tokens": [1, 1001], "seconds": [1e-6, 11e-6]}}
    plain = costs_of(np.outer(ACTIVE, np.array(TOKENS) * 1e-7), exchange=[EXCHANGE])
    costs = MeasuredCosts(SPEC, cluster("h100x8").with_gpus(2), profile=parse_profile(made, "made.json"))
    # rank 0 sends 200 assignments of 50 tokens, one half to itself; rank 1 sends nothing
    bytes_SG = np.array([[100.0, 100.0], [0.0, 0.0]]) * SPEC.token_bytes
    assert SPEC.K == 4
    assert costs.all_to_all_seconds(bytes_SG) - plain.all_to_all_seconds(bytes_SG) == pytest.approx(1.49e-6)


def test_a_measured_engine_layer_adds_what_its_parts_do_not_hold():
    law = np.outer(ACTIVE, np.array(TOKENS) * 1e-7)
    engine = {"tokens": [1, 101], "expert_seconds": [1e-6, 2e-6], "rest_seconds": [1e-5, 2e-5]}
    plain, whole = (costs_of(law, exchange=[entry]) for entry in (EXCHANGE, EXCHANGE | {"engine": engine}))
    plan = LayerPlan.build(0, np.arange(32), np.arange(32) // 16, np.ones(32, bool), num_experts=32, num_gpus=2)
    # each rank has 51 tokens of four rows; one expert takes as many rows as 51 tokens have
    bytes_SG = np.full((2, 2), 102.0 * SPEC.token_bytes)
    load_R = np.zeros(32, np.int64)
    load_R[3] = 4 * 51
    beyond = whole.expert_seconds(load_R, plan) - plain.expert_seconds(load_R, plan)
    assert beyond == pytest.approx([1.5e-6, 0.0])
    assert whole.all_to_all_seconds(bytes_SG) - plain.all_to_all_seconds(bytes_SG) == pytest.approx(1.5e-5)
    # the layer that was measured gathers
    elastic = PLANNERS.get("elastic").control
    saved = plain.control_seconds(elastic, 0) - whole.control_seconds(elastic, 0)
    assert saved == pytest.approx(EXCHANGE["gather_seconds"])
    # nothing is said of other numbers of ranks
    assert costs_of(law, gpus=4, exchange=[EXCHANGE | {"engine": engine}]).exchange.engine is None
    with pytest.raises(UserError, match=r"engine.rest.seconds must not descend"):
        costs_of(law, exchange=[EXCHANGE | {"engine": engine | {"rest_seconds": [2e-5, 1e-5]}}])


def test_elastic_keeps_no_copies_that_a_table_sees_save_less_than_dispatch_costs():
    # a line through this exchange promises much for equal bytes; by the table one full rank takes hardly any time
    entry = EXCHANGE | {"bytes": [1000, 10**9], "seconds": [1e-5, 1e-1], "hot_seconds": [1e-5, 2e-5]}
    mean_E = np.random.default_rng(0).dirichlet(np.full(SPEC.E, 0.3)) * 40_000
    x = PlanInput(0, Phase.PREFILL, Forecast(mean_E, mean_E, 10_000, "test"))

    def extras(token_seconds, **params):
        costs = costs_of(np.outer(ACTIVE, np.array(TOKENS) * token_seconds), exchange=[entry])
        budget = Budget.even(SPEC.E, 2, 2, SPEC.expert_bytes)
        setting = Setting(SPEC, costs.cluster, costs, budget, elastic.ElasticParams(**params))
        return elastic.PLANNER.plan(x, setting).num_extra

    assert extras(1e-12) == 0
    assert extras(1e-12, skip=False) > 0
    assert extras(1e-5) > 0


def test_link_model_fills_in_where_no_ranks_were_measured():
    costs = costs_of(np.outer(ACTIVE, np.array(TOKENS) * 1e-7), gpus=8, links="h100-dgx")
    bytes_SG = np.full((8, 8), 2e6)
    assert costs.all_to_all_seconds(bytes_SG) == pytest.approx(2 * 7 * 2e6 / 343e9, rel=0.25)
    assert "the exchange is computed from the link model h100-dgx, not measured among ranks" in costs.warnings
    link, latency = costs.exchange.linear()
    assert 1 / link == pytest.approx(343e9, rel=0.1)
    assert 0 < latency < 20e-6


def broken(change):
    made = copy.deepcopy(document(np.outer(ACTIVE, np.array(TOKENS) * 1e-7)))
    change(made)
    return made


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(format=7), "has format 7, this version reads format 1"),
        (lambda d: d.update(kind="trace"), "is not a hardware profile"),
        (lambda d: d.update(extra=1), "unknown field extra"),
        (lambda d: d["experts"][0]["seconds"][1].__setitem__(2, -1e-6), "must be a positive number, got -1e-06"),
        (lambda d: d["experts"][0]["seconds"][1].__setitem__(2, float("nan")), "must be a positive number, got nan"),
        (lambda d: d["experts"][0]["seconds"][3].__setitem__(7, 1e-9), "fall where tokens or active experts rise"),
        (lambda d: d["experts"][0]["seconds"].pop(), "must be 4 rows of 8 times"),
        (lambda d: d["experts"][0]["tokens"].__setitem__(0, 2), "must ascend"),
        (lambda d: d["parts"].pop("permute"), "parts lacks permute"),
        (lambda d: d["copies"]["host_to_device_pinned"].update(seconds=[2e-6, 1e-6]), "must not descend"),
        (lambda d: d.update(exchange=[EXCHANGE | {"ranks": 1}]), "ranks must be a whole number of at least 2"),
        (lambda d: d.update(exchange=[EXCHANGE | {"hot_seconds": [2e-5, 9e-5]}]), "none above the even exchange"),
        (lambda d: d.update(default_dtype="float64"), "has no expert times of grouped_mm/float64"),
        *((lambda d, name=name: d.pop(name), "") for name in FIELDS),
    ],
)
def test_a_broken_profile_is_refused_with_a_sentence(change, says):
    with pytest.raises(UserError, match="profile") as refused:
        parse_profile(broken(change), "some.json")
    assert says in str(refused.value)
    assert "some.json" in str(refused.value)


def test_mixed_differences_below_zero_are_refused():
    seconds = np.outer(ACTIVE, np.array(TOKENS) * 1e-7)
    # rises along both axes, but the last step adds less than it does with one expert active
    seconds[1:, -1] = np.array([1100, 1500, 1900]) * 1e-7
    with pytest.raises(UserError, match="an added token costs less with more experts active"):
        parse_profile(document(seconds), "some.json")


def test_a_file_cut_in_half_or_missing_is_refused(tmp_path):
    whole = json.dumps(document(np.outer(ACTIVE, np.array(TOKENS) * 1e-7)))
    path = tmp_path / "profile.json"
    path.write_text(whole)
    assert load_profile(path).name == "made"
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not valid JSON"):
        load_profile(path)
    with pytest.raises(UserError, match="neither a profile's file nor the name of a shipped one"):
        load_profile(tmp_path / "absent.json")


def test_another_model_is_refused():
    profile = parse_profile(document(np.outer(ACTIVE, np.array(TOKENS) * 1e-7)), "made.json")
    with pytest.raises(UserError, match="was measured for model 'gpt-oss-20b', not for 'mixtral-8x7b'"):
        MeasuredCosts(preset("mixtral-8x7b"), cluster("h100x8"), profile=profile)


def test_a_profile_is_named_after_a_colon(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(document(np.outer(ACTIVE, np.array(TOKENS) * 1e-7))))
    costs = COSTS.get(f"measured:{path}")(SPEC, cluster("h100x8"))
    assert costs.profile.name == "made"
    for wrong in ("measured:", "roofline:gpu.json", "measured:nowhere"):
        with pytest.raises(UserError):
            COSTS.get(wrong)


def test_measured_is_registered_and_says_what_to_do_without_a_profile():
    with pytest.raises(UserError, match="moeless profile --model mixtral-8x7b --device cuda"):
        COSTS.get("measured")(preset("mixtral-8x7b"), cluster("h100x8"))
