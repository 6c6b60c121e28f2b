"""The blend: a mixture that training data chose, and history wherever nothing shows a gain."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.contracts import Context, Phase
from moeless.errors import UserError
from moeless.predictors import blend_weights, load_predictor
from moeless.predictors.blend import Blend
from moeless.predictors.evaluation import Evaluator, mean_of
from moeless.predictors.fitting import FitInput
from moeless.predictors.request_split import split_requests
from moeless.predictors.token_table import TokenTable
from moeless.predictors.trace_rows import Rows
from moeless.predictors.variance import Variance, widen


@pytest.fixture(scope="module")
def world(made):
    rows = Rows(made.trace)
    split = split_requests(made.trace.requests.category)
    options = {"part": "transition", "epochs": 20, "batch_tokens": 64, "windows": 16}
    blend = Blend.fit(FitInput(rows, split, (1, 2), options=options))
    assert isinstance(blend, Blend)
    return rows, split, blend


def context(rows: Rows, row_T: np.ndarray, layer: int, **changes) -> Context:
    known = {
        "router_input_TH": None,
        "topk_TK": rows.topk_TLK[row_T, max(layer, 0)],
        "history_E": np.arange(1.0, rows.spec.E + 1),
        "last_load_E": np.arange(rows.spec.E, 0, -1),
        "tokens": len(row_T),
        "phase": Phase.PREFILL,
    }
    return Context(**(known | changes))


def with_weights(blend: Blend, weight_S: tuple[float, float, float], table: TokenTable | None = None) -> Blend:
    shape = (len(blend.pairs), 2, len(blend.sizes))
    return Blend(
        blend.spec, blend.part, blend.pairs, blend.sizes, np.broadcast_to(weight_S, (*shape, 3)),
        np.broadcast_to([2.0, 0.5], (*shape, 2)), np.broadcast_to([0.2, 0.4], (*shape, 2)),
        table,
    )  # fmt: skip


@given(
    weight=st.tuples(*[st.floats(0.0, 1.0)] * 3).filter(lambda w: sum(w) > 0.01),
    missing=st.sets(st.sampled_from(["history_E", "last_load_E"])),
    tokens=st.integers(1, 90),
    layer=st.integers(-2, 2),
)
@settings(max_examples=40, deadline=None)
def test_any_mixture_sums_to_tokens_times_top_k(world, weight, missing, tokens, layer):
    rows, _, blend = world
    given_ = context(rows, np.arange(tokens), layer, **dict.fromkeys(missing))
    made = with_weights(blend, weight).predict(given_, layer, 1 if layer >= 0 else 2)
    assert made.mean_E.sum() == pytest.approx(tokens * rows.spec.K)
    assert (made.var_E > 0).all()


def test_weights_say_how_much_of_each_source_is_in_it(world):
    rows, _, blend = world
    given_ = context(rows, np.arange(60), 0)
    tokens_E = blend.part.predict(given_, 0, 1).mean_E
    past_E = given_.history_E / given_.history_E.sum() * 60 * rows.spec.K
    last_E = given_.last_load_E / given_.last_load_E.sum() * 60 * rows.spec.K
    made = with_weights(blend, (0.5, 0.3, 0.2)).predict(given_, 0, 1)
    assert made.mean_E == pytest.approx(0.5 * tokens_E + 0.3 * past_E + 0.2 * last_E)
    assert made.var_E == pytest.approx(Variance(2.0, 0.5).of(made.mean_E))
    assert with_weights(blend, (0.0, 1.0, 0.0)).predict(given_, 0, 1).source == "history"
    # without a last iteration its weight goes to the others, in proportion
    left = with_weights(blend, (0.5, 0.3, 0.2)).predict(context(rows, np.arange(60), 0, last_load_E=None), 0, 1)
    assert left.mean_E == pytest.approx((0.5 * tokens_E + 0.3 * past_E) / 0.8)


def test_skill_is_the_gain_over_history_on_validation(world):
    _, _, blend = world
    assert with_weights(blend, (1.0, 0.0, 0.0)).skill(0, 1, Phase.DECODE, 64) == pytest.approx(0.5)
    assert blend.skill(0, 1, Phase.PREFILL, 128) > 0.1
    assert blend.skill(0, 3, Phase.PREFILL, 128) is None


def test_it_is_no_worse_than_history_and_no_worse_than_its_part(world):
    rows, split, blend = world
    evaluator = Evaluator(rows, split, (1, 2), (16, 64), resamples=4, per_resample=4)
    mine, part = evaluator.evaluate(blend), evaluator.evaluate(blend.part)
    for d in (1, 2):
        for size in (16, 64):
            assert mean_of(mine, "l1_over_history", d, "prefill", size) < 0
            error = mean_of(mine, "relative_l1", d, "prefill", size)
            assert error <= mean_of(part, "relative_l1", d, "prefill", size) * 1.15
            assert 0.6 < mean_of(mine, "coverage_90", d, "prefill", size) <= 1.0
    assert not [row for row in mine if row.metric == "l1_over_history" and row.low > 0]


def test_the_first_layers_are_forecast_from_what_was_best_for_them(world):
    rows, _, blend = world
    given_ = context(rows, np.arange(40), -1)
    first = blend.predict(given_, -1, 1)
    assert first.mean_E == pytest.approx(blend.predict(given_, -2, 2).mean_E)
    assert blend.weights(-1, 1, Phase.PREFILL, 40)[blend_weights.TOKENS] == 0.0


def test_the_first_layers_are_forecast_from_token_ids_where_they_are_known(world, tmp_path):
    rows, _, blend = world
    rng = np.random.default_rng(0)
    E, K = rows.spec.E, rows.spec.K
    # every id goes to experts of its own, in both of the first layers
    chosen_VMK = np.stack([[rng.permutation(E)[:K] for _ in range(2)] for _ in range(20)])
    token_T = rng.integers(0, 20, 5000)
    mean_ME = np.full((2, E), 1 / E)
    table = TokenTable.fit(token_T + 7, chosen_VMK[token_T], mean_ME)
    true_E = np.bincount(chosen_VMK[token_T[:300], 1].ravel(), minlength=E)
    assert table.share(token_T[:300] + 7, 1) == pytest.approx(true_E / true_E.sum(), abs=0.01)
    assert table.share(np.full(9, -1), 0) == pytest.approx(mean_ME[0])
    order = rng.permutation(E)
    moved = TokenTable.fit(token_T, np.argsort(order)[chosen_VMK[token_T]], mean_ME)
    assert moved.share(token_T[:50], 0) == pytest.approx(table.share(token_T[:50] + 7, 0)[order])

    made = with_weights(blend, (1.0, 0.0, 0.0), table)
    made.save(tmp_path / "p")
    for predictor in (made, load_predictor(tmp_path / "p")):
        first = predictor.predict(context(rows, np.arange(300), -1, token_T=token_T[:300] + 7), -1, 2)
        assert first.mean_E == pytest.approx(table.share(token_T[:300] + 7, 1) * 300 * K)
        # an engine that does not know them, and a layer that is not one of the first
        assert predictor.predict(context(rows, np.arange(300), -1), -1, 2).source == "history"
        assert predictor.predict(context(rows, np.arange(9), -1, token_T=token_T[:9]), -1, 4).source == "history"


def test_a_source_that_knows_is_taken_and_one_that_guesses_is_not():
    rng = np.random.default_rng(0)
    true_IE = rng.dirichlet(np.ones(8), 40)
    noise_IE = rng.dirichlet(np.ones(8), 40)
    even_IE = np.full((40, 8), 1 / 8)
    assert blend_weights.choose(np.stack([true_IE, even_IE, noise_IE]), true_IE, 40).weight_S.tolist() == [
        1.0,
        0.0,
        0.0,
    ]
    assert blend_weights.choose(np.stack([noise_IE, true_IE, noise_IE]), true_IE, 40).weight_S.tolist() == [
        0.0,
        1.0,
        0.0,
    ]
    # one iteration proves nothing
    assert blend_weights.choose(np.stack([true_IE, even_IE, noise_IE]), true_IE, 1).weight_S.tolist() == [0.0, 1.0, 0.0]


def test_too_few_iterations_of_a_size_borrow_from_a_smaller_one_unless_they_speak_against_it() -> None:
    rng = np.random.default_rng(3)
    true_IE = rng.dirichlet(np.ones(8), 2)
    even_IE = np.full_like(true_IE, 1 / 8)
    half_S = np.array([0.5, 0.5, 0.0])
    kept = blend_weights.choose(np.stack([true_IE, even_IE, even_IE]), true_IE, 1, half_S)
    assert kept.weight_S.tolist() == [0.5, 0.5, 0.0]
    assert kept.error == pytest.approx(kept.history_error / 2)
    worse_IE = 2 * even_IE - true_IE
    refused = blend_weights.choose(np.stack([worse_IE, even_IE, even_IE]), true_IE, 1, half_S)
    assert refused.weight_S.tolist() == [0.0, 1.0, 0.0]
    assert refused.error == refused.history_error


def test_weights_between_two_sizes_are_between_the_two():
    table = np.array([[0.0, 1.0], [1.0, 0.0]])
    assert blend_weights.at_size((8, 32), table, 16) == pytest.approx([0.5, 0.5])
    assert blend_weights.at_size((8, 32), table, 1) == pytest.approx([0.0, 1.0])
    assert blend_weights.at_size((8, 32), table, 10_000) == pytest.approx([1.0, 0.0])


def test_a_widened_variance_covers_ninety_percent_of_long_tails():
    rng = np.random.default_rng(1)
    mean = np.full(20_000, 200.0)
    load = np.rint(mean + 10 * rng.standard_t(3, len(mean)))
    found = widen(Variance(1.0, 0.0), mean, load)
    inside = np.abs(load - mean) <= 1.645 * np.sqrt(found.of(mean)) + 0.5
    assert inside.mean() == pytest.approx(0.9, abs=0.01)


def test_a_folder_brings_back_the_same_blend(world, tmp_path):
    rows, _, blend = world
    blend.save(tmp_path / "p")
    loaded = load_predictor(tmp_path / "p")
    for layer, distance in ((0, 1), (1, 2), (-1, 1)):
        given_ = context(rows, np.arange(70), layer)
        before, after = blend.predict(given_, layer, distance), loaded.predict(given_, layer, distance)
        assert np.array_equal(before.mean_E, after.mean_E)
        assert np.array_equal(before.var_E, after.var_E)
    assert loaded.reads == "topk"


def test_a_part_that_forecasts_no_tokens_is_refused(world):
    rows, split, _ = world
    with pytest.raises(UserError, match="token-level part"):
        Blend.fit(FitInput(rows, split, options={"part": "history"}))
