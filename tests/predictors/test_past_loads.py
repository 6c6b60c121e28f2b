"""Predictors that need no fitting: what they forecast, what they refuse, how they are kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.contracts import Context, Phase
from moeless.errors import UserError
from moeless.predictors import PREDICTORS, load_predictor
from moeless.spec import preset

SPEC = preset("bundled")
NAMES = ("none", "history", "last", "window", "oracle")


def context(rng: np.random.Generator, tokens: int, **changes) -> Context:
    known = {
        "router_input_TH": None,
        "topk_TK": None,
        "history_E": rng.random(SPEC.E),
        "last_load_E": rng.integers(0, 50, SPEC.E),
        "tokens": tokens,
        "phase": Phase.DECODE,
        "true_load_E": rng.integers(0, 50, SPEC.E),
        "recent_E": rng.integers(0, 50, SPEC.E),
    }
    return Context(**(known | changes))


@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(0, 5000), name=st.sampled_from(NAMES))
@settings(max_examples=60, deadline=None)
def test_mean_sums_to_tokens_times_top_k(seed, tokens, name):
    made = PREDICTORS.get(name)(SPEC).predict(context(np.random.default_rng(seed), tokens), 2, 3)
    assert made.mean_E.sum() == pytest.approx(tokens * SPEC.K)
    assert made.tokens == tokens


@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(NAMES))
@settings(max_examples=40, deadline=None)
def test_permuting_experts_permutes_the_forecast(seed, name):
    rng = np.random.default_rng(seed)
    given_ = context(rng, 100)
    order = rng.permutation(SPEC.E)
    shuffled = Context(
        None, None, given_.history_E[order], given_.last_load_E[order], 100, Phase.DECODE, given_.true_load_E[order],
        given_.recent_E[order],
    )  # fmt: skip
    predictor = PREDICTORS.get(name)(SPEC)
    before, after = predictor.predict(given_, 0, 1), predictor.predict(shuffled, 0, 1)
    assert np.allclose(before.mean_E[order], after.mean_E)
    assert np.allclose(before.var_E[order], after.var_E)


def test_each_follows_its_source():
    rng = np.random.default_rng(0)
    given_ = context(rng, 1000)
    for name, source_E in (
        ("history", given_.history_E),
        ("last", given_.last_load_E),
        ("window", given_.recent_E),
        ("oracle", given_.true_load_E),
        ("none", np.ones(SPEC.E)),
    ):
        made = PREDICTORS.get(name)(SPEC).predict(given_, 0, 1)
        assert np.allclose(made.mean_E, source_E / source_E.sum() * 1000 * SPEC.K)


def test_without_history_the_last_load_serves_and_without_both_equal_shares():
    rng = np.random.default_rng(1)
    predictor = PREDICTORS.get("history")(SPEC)
    assert predictor.predict(context(rng, 10, history_E=None), 0, 1).source == "last"
    cold = predictor.predict(context(rng, 10, history_E=None, last_load_E=None), 0, 1)
    assert cold.source == "uniform"
    assert np.allclose(cold.mean_E, 10 * SPEC.K / SPEC.E)


def test_an_iteration_that_routed_nothing_before_is_no_source():
    rng = np.random.default_rng(1)
    made = PREDICTORS.get("last")(SPEC).predict(context(rng, 10, last_load_E=np.zeros(SPEC.E)), 0, 1)
    assert made.source == "history"


@pytest.mark.parametrize("field", ["history_E", "last_load_E", "true_load_E", "recent_E"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_values_that_are_no_loads_are_refused(field, bad):
    values = np.ones(SPEC.E)
    values[3] = bad
    names = {"history_E": "history", "last_load_E": "last", "true_load_E": "oracle", "recent_E": "window"}
    name = names[field]
    with pytest.raises(UserError, match="finite"):
        PREDICTORS.get(name)(SPEC).predict(context(np.random.default_rng(0), 5, **{field: values}), 0, 1)


def test_a_layer_that_does_not_exist_is_refused():
    for name in NAMES:
        with pytest.raises(UserError, match="8 MoE layers"):
            PREDICTORS.get(name)(SPEC).predict(context(np.random.default_rng(0), 5), 6, 2)


def test_the_oracle_refuses_to_guess():
    with pytest.raises(UserError, match="true load"):
        PREDICTORS.get("oracle")(SPEC).predict(context(np.random.default_rng(0), 5, true_load_E=None), 0, 1)


def test_load_predictors_forecast_no_tokens():
    with pytest.raises(UserError, match="forecasts loads"):
        PREDICTORS.get("history")(SPEC).predict_topk(np.zeros((1, 2)), 0, 1)


def test_a_folder_brings_back_the_same_predictor(tmp_path):
    PREDICTORS.get("last")(SPEC).save(tmp_path / "p")
    loaded = load_predictor(tmp_path / "p")
    assert loaded.name == "last"
    assert loaded.spec == SPEC
    assert sorted(entry.name for entry in (tmp_path / "p").iterdir()) == ["predictor.json", "weights.safetensors"]


def test_another_method_s_folder_is_refused(tmp_path):
    PREDICTORS.get("last")(SPEC).save(tmp_path / "p")
    with pytest.raises(UserError, match="holds predictor 'last', not 'history'"):
        PREDICTORS.get("history").load(tmp_path / "p")


def test_damaged_folders_are_refused_with_a_sentence(tmp_path):
    with pytest.raises(UserError, match="is not a predictor"):
        load_predictor(tmp_path)
    folder = tmp_path / "p"
    PREDICTORS.get("last")(SPEC).save(folder)
    whole = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        load_predictor(folder)
    head = json.loads((folder / "predictor.json").read_text())
    (folder / "predictor.json").write_text(json.dumps(head | {"format": 99}))
    with pytest.raises(UserError, match="format 1"):
        load_predictor(folder)


def test_another_model_is_refused_with_a_sentence():
    with pytest.raises(UserError, match=r"fitted on bundled.*is of gpt-oss-20b"):
        PREDICTORS.get("history")(SPEC).check_spec(preset("gpt-oss-20b"), "the trace")
