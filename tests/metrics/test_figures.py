import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.errors import UserError
from moeless.metrics.balance import balancedness, gap_closed, imbalance
from moeless.metrics.billing import Meter
from moeless.metrics.latency import cdf, summarise
from moeless.metrics.requests import Objective, RequestTimes, good_requests, parse_goodput, request_metrics


@given(
    st.lists(st.tuples(st.floats(0, 1e3), st.integers(0, 5)), min_size=1, max_size=30).filter(
        lambda pairs: any(count for _, count in pairs)
    )
)
def test_weighted_summary_is_that_of_the_repeated_values(pairs):
    values, counts = np.array([v for v, _ in pairs]), np.array([c for _, c in pairs])
    repeated = np.repeat(values, counts)
    got = summarise(values, counts)
    assert got.samples == len(repeated)
    assert got.mean == pytest.approx(repeated.mean(), abs=1e-9)
    assert got.std == pytest.approx(repeated.std(), abs=1e-6)
    for name, q in (("median", 50), ("p90", 90), ("p99", 99)):
        assert getattr(got, name) == pytest.approx(np.percentile(repeated, q), abs=1e-9)


def test_no_samples_give_no_figures():
    assert summarise([]) is None
    assert summarise([1.0], [0]) is None
    assert cdf([]) == ()


def test_imbalance_averages_ratios_not_loads():
    load_LG = np.array([[4.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    assert imbalance(load_LG).tolist() == [2.0, 2.0, 1.0]
    assert imbalance(load_LG.sum(0)) == 1.0
    assert balancedness(load_LG).tolist() == [0.5, 0.5, 1.0]


def test_gap_closed_ends():
    static, bound = np.array([3.0, 5.0]), np.array([1.0, 2.0])
    assert gap_closed(static, static, bound) == 0.0
    assert gap_closed(static, bound, bound) == 1.0
    with pytest.raises(ValueError, match="no gap"):
        gap_closed(bound, bound, bound)


def test_bills_add_up_from_the_meter():
    bill = Meter(2e9, 64e9, 1e9, 30e9, 7200.0).bill(cluster("h100x8"))
    assert (bill.paper, bill.resident, bill.gpu_seconds, bill.paper_whole) == (3.0, 30.0, 7200.0, 65.0)
    assert bill.gpu_dollars == pytest.approx(2 * cluster("h100x8").device.price_per_hour)


def _times() -> RequestTimes:
    return RequestTimes(
        arrival_N=np.array([0.0, 1.0, 1.0]),
        first_token_N=np.array([0.5, 1.2, 3.0]),
        last_token_N=np.array([1.0, 1.2, 5.0]),
        input_tokens_N=np.array([10, 20, 30]),
        output_tokens_N=np.array([6, 1, 3]),
        itl_seconds_I=np.array([0.1, 1.0]),
        itl_count_I=np.array([5, 2]),
    )


def test_request_figures_by_hand():
    got = request_metrics(_times(), duration=5.0, failed=1, objectives=(Objective("ttft", 500.0),))
    assert got.mean_ttft_ms == pytest.approx(1e3 * (0.5 + 0.2 + 2.0) / 3)
    # one-token answers have no TPOT
    assert got.mean_tpot_ms == pytest.approx(1e3 * (0.1 + 1.0) / 2)
    assert got.mean_itl_ms == pytest.approx(1e3 * (0.5 + 2.0) / 7)
    assert got.p99_e2el_ms == pytest.approx(1e3 * np.percentile([1.0, 0.2, 4.0], 99))
    assert (got.completed, got.failed, got.total_input_tokens, got.total_output_tokens) == (3, 1, 60, 10)
    assert got.output_throughput == 2.0
    # the first request ends as the other two arrive
    assert got.max_concurrent_requests == 2
    assert got.request_goodput == pytest.approx(2 / 5)


def test_a_limit_that_is_just_reached_is_met_and_one_token_answers_have_tpot_zero():
    assert good_requests(_times(), parse_goodput(["ttft:500"])) == 2
    assert good_requests(_times(), parse_goodput(["tpot:100", "e2el:1000"])) == 2
    assert good_requests(_times(), parse_goodput(["tpot:99"])) == 1


@pytest.mark.parametrize("text", ["ttft", "ttft:0", "itl:5", "ttft:5 ttft:6", "tpot:-3"])
def test_bad_goodput_is_one_sentence(text):
    with pytest.raises(UserError, match="--goodput"):
        parse_goodput([text])
