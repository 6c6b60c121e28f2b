"""Fitted predictors: what they learn, forecast, keep and refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from moeless.contracts import Context, Phase
from moeless.errors import UserError
from moeless.predictors import PREDICTORS, load_predictor, token_loads
from moeless.predictors.evaluation import Evaluator, mean_of
from moeless.predictors.fitting import FitInput
from moeless.predictors.from_scratch import FromScratch
from moeless.predictors.gate_reuse import GateReuse
from moeless.predictors.gates import Gates, read_gates
from moeless.predictors.layer_aware import LayerAware
from moeless.predictors.request_split import split_requests
from moeless.predictors.token_loads import TokenLoads
from moeless.predictors.trace_rows import Rows
from moeless.predictors.transition import Transition
from moeless.predictors.variance import Variance, widen
from moeless.spec import preset

FITTED = ("gate_reuse", "layer_aware", "from_scratch", "transition", "frequency")


@pytest.fixture(scope="module")
def world(made):
    rows = Rows(made.trace)
    split = split_requests(made.trace.requests.category)
    gates = read_gates(made.model, made.spec)
    # enough passes for 1,000 tokens
    options = {"layer_aware": {"threshold": 0.99, "epochs": 40, "learning_rate": 0.02, "batch_tokens": 128},
               "transition": {"epochs": 20, "batch_tokens": 64},
               "from_scratch": {"hidden": 32, "epochs": 20, "patience": 5, "batch_tokens": 128}}  # fmt: skip
    fitted = {
        name: PREDICTORS.get(name).fit(FitInput(rows, split, (1, 2), options=options.get(name, {}), gates=gates))
        for name in FITTED
    }
    return rows, split, gates, fitted


def context(rows: Rows, row_T: np.ndarray, layer: int, **changes) -> Context:
    spec = rows.spec
    known = {
        "router_input_TH": rows.inputs(row_T)[:, layer],
        "topk_TK": rows.topk_TLK[row_T, layer],
        "history_E": np.full(spec.E, 1.0 / spec.E),
        "last_load_E": None,
        "tokens": len(row_T),
        "phase": Phase.PREFILL,
    }
    return Context(**(known | changes))


def test_gates_are_read_as_stored(made, world):
    assert np.array_equal(world[2].weight_LEH, made.gate_LEH.numpy())


def test_a_layer_s_own_gate_explains_its_routing(made, world):
    rows, _, gates, _ = world
    row_T = np.arange(200)
    logits = np.einsum("tlh,leh->tle", rows.inputs(row_T), gates.weight_LEH)
    chosen = np.sort(np.argsort(-logits, -1)[..., : made.spec.K], -1)
    assert (chosen == np.sort(rows.topk_TLK[row_T], -1)).mean() > 0.999


def test_gates_of_another_checkpoint_are_refused(world):
    rows, split, gates, _ = world
    other = Gates(gates.weight_LEH[::-1].copy(), None, None, gates.rule, "other")
    with pytest.raises(UserError, match="gates of other are not those that made"):
        GateReuse.fit(FitInput(rows, split, gates=other))


@pytest.mark.parametrize("name", FITTED)
def test_forecasts_sum_to_tokens_times_top_k(world, name):
    rows, _, _, fitted = world
    for tokens in (1, 7, 300):
        made = fitted[name].predict(context(rows, np.arange(tokens), 1), 1, 2)
        assert made.mean_E.sum() == pytest.approx(tokens * rows.spec.K)
        assert (made.var_E > 0).all()


@pytest.mark.parametrize("name", ["gate_reuse", "layer_aware", "from_scratch", "transition"])
def test_the_sum_over_tokens_is_the_forecast(world, name):
    rows, _, _, fitted = world
    predictor, row_T = fitted[name], np.arange(64)
    inputs = rows.inputs(row_T)[:, 0] if predictor.reads == "router_inputs" else rows.topk_TLK[row_T, 0]
    single = predictor.token_loads(inputs, 0, 1)
    assert single.sum(1) == pytest.approx(np.full(64, rows.spec.K), abs=1e-4)
    assert single.sum(0) == pytest.approx(predictor.predict(context(rows, row_T, 0), 0, 1).mean_E, abs=1e-3)


def test_fine_tuning_beats_the_raw_gate_and_ids_beat_history(world):
    rows, split, _, fitted = world
    evaluator = Evaluator(rows, split, (1, 2), (64,), resamples=4, per_resample=4)
    found = {name: evaluator.evaluate(predictor) for name, predictor in fitted.items()}
    history = evaluator.evaluate(PREDICTORS.get("history")(rows.spec))
    oracle = evaluator.evaluate(PREDICTORS.get("oracle")(rows.spec))
    for d in (1, 2):
        recall = {name: mean_of(found[name], "topk_recall", d, "all", 1) for name in ("gate_reuse", "layer_aware")}
        assert recall["layer_aware"] > recall["gate_reuse"] + 0.1
        past = mean_of(history, "relative_l1", d, "prefill", 64)
        assert mean_of(found["transition"], "relative_l1", d, "prefill", 64) < past
        assert mean_of(found["layer_aware"], "relative_l1", d, "prefill", 64) < past
        assert mean_of(oracle, "relative_l1", d, "prefill", 64) == pytest.approx(0.0)
    for row in found["transition"]:
        assert row.low <= row.value <= row.high


def test_gates_that_pass_the_threshold_stay_raw(world):
    rows, split, gates, _ = world
    kept = LayerAware.fit(FitInput(rows, split, options={"threshold": 0.0}, gates=gates))
    assert kept.tuned_pairs == []
    raw = GateReuse(rows.spec, gates)
    inputs = rows.inputs(np.arange(50))[:, 0]
    assert np.array_equal(kept.predict_topk(inputs, 0, 1), raw.predict_topk(inputs, 0, 1))


@pytest.mark.parametrize("name", FITTED)
def test_fitting_again_gives_the_same(world, name):
    rows, split, gates, _fitted = world
    options = {"layer_aware": {"epochs": 2}, "transition": {"epochs": 2}, "from_scratch": {"epochs": 2, "hidden": 8}}
    given = FitInput(rows, split, options=options.get(name, {}), gates=gates)
    again = [PREDICTORS.get(name).fit(given).tensors() for _ in range(2)]
    assert all(np.array_equal(again[0][key], again[1][key]) for key in again[0])


@pytest.mark.parametrize("name", FITTED)
def test_a_folder_brings_back_the_same_forecasts(world, name, tmp_path):
    rows, _, _, fitted = world
    fitted[name].save(tmp_path / "p")
    loaded = load_predictor(tmp_path / "p")
    given = context(rows, np.arange(100), 0)
    before, after = fitted[name].predict(given, 0, 2), loaded.predict(given, 0, 2)
    assert np.array_equal(before.mean_E, after.mean_E)
    assert np.array_equal(before.var_E, after.var_E)


@pytest.mark.parametrize("name", ["gate_reuse", "layer_aware", "from_scratch"])
def test_values_that_are_not_finite_are_refused(world, name):
    rows, _, _, fitted = world
    inputs = rows.inputs(np.arange(10))[:, 0]
    inputs[3, 2] = np.nan
    with pytest.raises(UserError, match="not finite"):
        fitted[name].predict(context(rows, np.arange(10), 0, router_input_TH=inputs), 0, 1)


def test_ids_out_of_range_are_refused(world):
    rows, _, _, fitted = world
    with pytest.raises(UserError, match=r"0\.\.7"):
        fitted["transition"].predict_topk(np.full((3, rows.spec.K), 8), 0, 1)


def test_weights_that_are_not_finite_are_refused(world, tmp_path):
    from safetensors.numpy import load_file, save_file

    world[3]["transition"].save(tmp_path / "p")
    file = tmp_path / "p" / "weights.safetensors"
    tensors = load_file(file)
    tensors["direct"][0, 0, 0, 0] = np.inf
    save_file(tensors, file)
    with pytest.raises(UserError, match="'direct' holds a value that is not finite"):
        load_predictor(tmp_path / "p")


def test_without_a_source_layer_history_is_the_forecast(world):
    rows, _, _, fitted = world
    share = np.arange(rows.spec.E) / np.arange(rows.spec.E).sum()
    for name in ("gate_reuse", "layer_aware", "transition"):
        made = fitted[name].predict(context(rows, np.arange(5), 0, history_E=share), -1, 2)
        assert made.source == "history"
        assert made.mean_E == pytest.approx(share * 5 * rows.spec.K)


def test_a_distance_that_was_not_fitted_falls_back(world):
    rows, _, _, fitted = world
    assert fitted["transition"].predict(context(rows, np.arange(5), 0), 0, 3).source == "history"
    with pytest.raises(UserError, match="nothing fitted"):
        fitted["transition"].predict_topk(np.zeros((2, rows.spec.K), np.int64), 0, 3)


def test_permuting_experts_permutes_the_raw_gate_s_forecast(world):
    rows, _, gates, _ = world
    order = np.random.default_rng(0).permutation(rows.spec.E)
    shuffled = Gates(gates.weight_LEH[:, order], None, None, gates.rule, "")
    given = context(rows, np.arange(120), 0)
    before = GateReuse(rows.spec, gates).predict(given, 0, 1).mean_E
    assert np.array_equal(GateReuse(rows.spec, shuffled).predict(given, 0, 1).mean_E, before[order])


def test_permuting_experts_permutes_the_transition_s_forecast(world):
    rows, _, _, fitted = world
    predictor, E = fitted["transition"], rows.spec.E
    order = np.random.default_rng(1).permutation(E)
    state = {name: array.astype(np.float32) for name, array in predictor.tensors().items()}
    marked = np.concatenate([order + block * E for block in range(state["direct"].shape[2] // E)])
    moved = {
        "mean": state["mean"][:, order],
        "bias": state["bias"][..., order],
        "direct": state["direct"][:, :, marked][..., order],
        "inner": state["inner"][:, :, marked],
        "inner_bias": state["inner_bias"],
        "mean_inner": state["mean_inner"][:, :, order],
        "outer": state["outer"][..., order],
        "mean_first": state["mean_first"][:, :, order],
        "mean_bias": state["mean_bias"],
        "mean_second": state["mean_second"][..., order],
    }
    other = Transition(rows.spec, moved, predictor.distances)
    ids = rows.topk_TLK[:90, 0].astype(np.int64)
    renamed = np.argsort(order)[ids]
    assert other.mean_load(renamed, 0, 1) == pytest.approx(predictor.mean_load(ids, 0, 1)[order], rel=1e-3)


def test_permuting_experts_permutes_the_forecast_of_networks_from_scratch(world):
    rows, _, _, fitted = world
    predictor = fitted["from_scratch"]
    order = np.random.default_rng(2).permutation(rows.spec.E)
    state = predictor.tensors()
    moved = state | {"second": state["second"][:, :, order], "second_bias": state["second_bias"][:, :, order]}
    other = FromScratch(rows.spec, moved, predictor.distances)
    inputs = rows.inputs(np.arange(90))[:, 0]
    assert np.array_equal(other.mean_load(inputs, 0, 1), predictor.mean_load(inputs, 0, 1)[order])


def test_networks_from_scratch_learn_and_cost_what_table_2_says(world):
    rows, split, _, fitted = world
    evaluator = Evaluator(rows, split, (1,), (64,), resamples=4, per_resample=4)
    assert mean_of(evaluator.evaluate(fitted["from_scratch"]), "l1_over_history", 1, "prefill", 64) < 0
    E, H = rows.spec.E, rows.spec.hidden_size
    pairs = 3 + 2
    assert fitted["from_scratch"].memory_bytes == 2 * pairs * (32 * (H + E) + 32 + E)


def test_skill_is_known_where_a_pair_was_calibrated(world):
    _, _, _, fitted = world
    for name in ("layer_aware", "transition", "from_scratch"):
        assert fitted[name].skill(0, 1, Phase.PREFILL, 64) <= 1
        assert fitted[name].skill(0, 3, Phase.PREFILL, 64) is None


def test_unfitted_methods_say_how_to_fit_them():
    for name in FITTED:
        with pytest.raises(UserError, match=f"--method {name}"):
            PREDICTORS.get(name).unfitted(preset("bundled"))


def test_torch_inputs_on_the_fly_equal_numpy_ones(world):
    rows, _, _, fitted = world
    inputs = rows.inputs(np.arange(30))[:, 1]
    mine = fitted["layer_aware"].predict_topk(torch.from_numpy(inputs).to(torch.float32), 1, 1)
    assert np.array_equal(mine, fitted["layer_aware"].predict_topk(inputs, 1, 1))


def test_train_and_evaluate_commands(cli, made, tmp_path):
    out = tmp_path / "p"
    status, text, error = cli(
        "train-predictor", made.path, "--distance", "1..2", "--batch-tokens", "16,64", "--evaluate", "--out", out,
        "--json", "--param", "epochs=2",
    )  # fmt: skip
    assert status == 0, error
    assert json.loads(text)["method"] == "layer_aware"
    rows = json.loads((out / "metrics.json").read_text())["rows"]
    assert set(rows[0]) == {"layer", "distance", "phase", "batch_tokens", "metric", "value", "low", "high", "n"}
    assert {row["distance"] for row in rows} == {1, 2}
    status, text, error = cli("evaluate-predictor", out, made.path, "--batch-tokens", "32", "--out", tmp_path / "m")
    assert status == 0, error
    assert (tmp_path / "m" / "metrics.json").exists()


def test_curves_of_every_layer_and_epoch_are_in_the_run_that_wandb_mirrors(cli, made, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    status, _, error = cli(
        "train-predictor", made.path, "--distance", "1..2", "--out", "p", "--param", "epochs=2", "--threshold", "1",
        "--wandb",
    )  # fmt: skip
    assert status == 0, error
    (run,) = (tmp_path / "results" / "runs").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curves = [line for line in lines if "layer_aware/loss" in line]
    assert [line["step"] for line in curves] == [1, 2]
    for line in curves:
        # the last layer precedes none
        for name in ("loss", "validation_recall"):
            found = [line[f"layer_aware/{name}/layer_{layer:02d}"] for layer in range(made.spec.L - 1)]
            assert min(found) <= line[f"layer_aware/{name}"] <= max(found)
        assert f"layer_aware/loss/layer_{made.spec.L - 1:02d}" not in line


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--distance", "0"], "is not a list of whole numbers"),
        (["--distance", "4"], "leaves no layer"),
        (["--method", "nonsense"], "no predictor is called 'nonsense'"),
        (["--param", "colour=red"], "no parameter 'colour'"),
        (["--threshold", "1.5"], "between 0 and 1"),
        (["--param", "epochs=many"], "'epochs' must be a whole number of at least 1, not 'many'"),
        (["--param", "learning-rate=nan"], "'learning_rate' must be a number between 1e-09 and 1, not nan"),
        (["--model", "no/such-model"], "there is no model 'no/such-model' on this machine"),
    ],
)
def test_bad_requests_leave_a_sentence_and_nothing_else(cli, made, tmp_path, extra, sentence):
    status, _, error = cli("train-predictor", made.path, "--out", tmp_path / "p", *extra)
    assert status == 2
    assert sentence in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_another_model_s_predictor_is_refused_by_name(cli, made, tmp_path):
    PREDICTORS.get("history")(preset("bundled")).save(tmp_path / "p")
    status, _, error = cli("evaluate-predictor", tmp_path / "p", made.path)
    assert status == 2
    assert "was fitted on bundled" in error
    assert not (tmp_path / "p" / "metrics.json").exists()


def test_loads_in_a_scratch_file_are_those_in_memory(made, world, monkeypatch):
    rows, split, _, fitted = world
    row_T = rows.of(split.test)
    windows = [row_T[:40], row_T[17:30]]
    for name in ("layer_aware", "from_scratch"):
        held = TokenLoads(fitted[name], rows, row_T, [(0, 1), (1, 2)])
        monkeypatch.setattr(token_loads, "LOADS_BYTES", 0)
        monkeypatch.setattr(token_loads, "BLOCK_BYTES", 4 * rows.spec.L * rows.spec.hidden_size * 50)
        filed = TokenLoads(fitted[name], rows, row_T, [(0, 1), (1, 2)])
        monkeypatch.undo()
        for layer, distance in ((0, 1), (1, 2)):
            inputs = rows.inputs(np.sort(row_T))[:, layer]
            expected = fitted[name].token_loads(inputs, layer, distance)
            assert np.array_equal(held.of(layer, distance), expected)
            assert np.array_equal(filed.of(layer, distance), expected)
            assert np.array_equal(held.hits(layer, distance), filed.hits(layer, distance))
            assert np.array_equal(held.sums(windows, layer, distance), filed.sums(windows, layer, distance))


def test_variance_calibrated_on_few_iterations_is_wider():
    mean, load = np.full((4, 50), 100.0), np.random.default_rng(0).poisson(100, (4, 50))
    many, few = widen(Variance(), mean, load), widen(Variance(), mean, load, 4.0)
    assert few.scale == pytest.approx(1.25 * many.scale)
