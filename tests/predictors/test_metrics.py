"""Metrics, splits, iterations and variances on cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moeless.contracts import Phase
from moeless.errors import UserError
from moeless.predictors import metrics
from moeless.predictors.iterations import decode_iterations, prefill_iterations
from moeless.predictors.request_split import split_requests
from moeless.predictors.trace_rows import Rows
from moeless.predictors.variance import fit_variance


def test_metrics_of_a_known_forecast():
    mean, load = np.array([[4.0, 4.0, 2.0, 0.0]]), np.array([[2, 6, 1, 1]])
    assert metrics.relative_l1(mean, load) == pytest.approx([0.6])
    assert metrics.relative_l1(load.astype(float), load) == pytest.approx([0.0])
    assert metrics.pearson(load.astype(float), load) == pytest.approx([1.0])
    assert metrics.hottest_hit(mean, load).tolist() == [0.0]
    assert metrics.straggler_hit(mean, load, 2).tolist() == [1.0]
    assert metrics.coverage(mean, np.zeros((1, 4)), load).tolist() == [0.0]
    assert metrics.coverage(mean, np.full((1, 4), 1.0), load).tolist() == [1.0]


def test_a_constant_forecast_has_no_correlation():
    assert metrics.pearson(np.ones((1, 4)), np.array([[1, 2, 3, 4]])).tolist() == [0.0]


def test_the_variance_finds_the_noise_that_was_put_in():
    rng = np.random.default_rng(0)
    mean = rng.uniform(10, 500, 40_000)
    noisy = mean + rng.standard_normal(len(mean)) * np.sqrt(2.0 * mean + 0.04 * mean**2)
    found = fit_variance(mean, noisy)
    assert found.scale == pytest.approx(2.0, rel=0.4)
    assert found.spread == pytest.approx(0.04, rel=0.1)


@pytest.mark.parametrize("by", ["request", "category", "time"])
def test_no_request_is_on_two_sides(by):
    category = [f"c{i % 5}" for i in range(50)]
    split = split_requests(category, by)
    parts = [set(part.tolist()) for part in (split.fit, split.validation, split.test)]
    assert sum(map(len, parts)) == 50
    assert set.union(*parts) == set(range(50))
    if by == "category":
        names = [{category[i] for i in part} for part in (parts[0] | parts[1], parts[2])]
        assert not names[0] & names[1]
    if by == "time":
        assert max(split.train) < min(split.test)


def test_the_split_is_the_one_that_serve_bench_serves():
    order = np.random.default_rng(0).permutation(100)
    assert split_requests([""] * 100).test.tolist() == sorted(order[70:].tolist())


def test_too_few_requests_or_categories_are_refused():
    with pytest.raises(UserError, match="at least 3 requests"):
        split_requests(["a", "b"])
    with pytest.raises(UserError, match="two categories"):
        split_requests(["a"] * 10, "category")


def test_prefill_iterations_are_consecutive_prompt_rows(made):
    rows = Rows(made.trace)
    iterations = prefill_iterations(rows, np.array([2, 5, 6]), 25)
    joined = np.concatenate([each.row_T for each in iterations])
    assert [each.tokens for each in iterations] == [25, 25]
    assert (rows.phase_T[joined] == Phase.PREFILL).all()
    assert joined.tolist() == [rows.first_N[q] + i for q in (2, 5, 6) for i in range(20)][:50]
    assert iterations[1].previous_T.tolist() == iterations[0].row_T.tolist()


def test_decode_iterations_follow_the_previous_token_of_each_request(made):
    rows = Rows(made.trace)
    for each in decode_iterations(rows, np.arange(10), 16, 5, np.random.default_rng(0)):
        assert (rows.phase_T[each.row_T] == Phase.DECODE).all()
        assert (each.row_T - each.previous_T == 1).all()
        assert (rows.phase_T[each.previous_T] == Phase.DECODE).all()
