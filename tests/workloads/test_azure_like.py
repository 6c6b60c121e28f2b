"""The default generator matches the trace that it was fitted to, and says how well."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ks_2samp

from moeless.errors import UserError
from moeless.workloads.arrivals import load, read_arrivals
from moeless.workloads.azure_like import FittedArrivals, load_fitted
from moeless.workloads.fit import dispersion, fit_file, fit_series


def _shipped() -> dict:
    import moeless.workloads

    folder = Path(moeless.workloads.__file__).resolve().parent.parent / "assets" / "arrivals"
    return json.loads((folder / "azure-2023-conv.json").read_text())


def test_the_shipped_fit_is_close_and_names_its_origin():
    shipped = _shipped()
    assert shipped["goodness"]["ks"]["gap"] < 0.05
    assert shipped["goodness"]["ks"]["prompt_tokens"] < 0.02
    assert shipped["goodness"]["ks"]["output_tokens"] < 0.02
    assert shipped["provenance"]["requests"] == 19_366
    assert "AzurePublicDataset" in shipped["provenance"]["origin"]
    assert "goodness_second_half_by_first" in shipped


def test_draws_match_the_trace_in_rate_bursts_and_lengths(shared_data: Path):
    trace = read_arrivals(shared_data / "arrivals" / "azure-2023-conv.csv")
    drawn = load("azure-like", duration=float(trace.time_N[-1]), seed=5)
    assert drawn.rate == pytest.approx(trace.rate, rel=0.25)  # the slow modulation moves an hour's mean by 8 %
    assert drawn.burstiness == pytest.approx(trace.burstiness, abs=0.15)
    assert ks_2samp(drawn.prompt_N, trace.prompt_N).statistic < 0.02
    assert ks_2samp(drawn.output_N, trace.output_N).statistic < 0.02
    # over ten seconds, counts vary far more than Poisson's, as in the trace
    ratios = [dispersion(load("azure-like", duration=3500, seed=s).time_N, (10.0,))[0] for s in range(8)]
    assert np.mean(ratios) == pytest.approx(dispersion(trace.time_N, (10.0,))[0], rel=0.4)


def test_refitting_the_trace_gives_the_shipped_parameters(shared_data: Path, tmp_path: Path):
    report = fit_file(shared_data / "arrivals" / "azure-2023-conv.csv", tmp_path / "fit.json")
    shipped = _shipped()
    assert report["provenance"]["sha256"] == shipped["provenance"]["sha256"]
    for key in ("rate", "gap_shape", "copula_correlation"):
        assert report["parameters"][key] == pytest.approx(shipped["parameters"][key], rel=1e-2)
    assert report["parameters"]["prompt_quantiles"] == shipped["parameters"]["prompt_quantiles"]
    assert json.loads((tmp_path / "fit.json").read_text()) == report


def test_the_fit_recovers_a_known_process():
    truth = FittedArrivals(
        6.0,
        1.0,
        np.array([0.02, 0.08]),
        np.array([5.0, 300.0]),
        np.array([0.0, 1.0]),
        np.array([1.0, 1001.0]),
        np.array([1.0, 201.0]),
        0.5,
    )
    rng = np.random.default_rng(0)
    times = truth.times(rng, 60_000, None)
    prompt, output = truth.lengths(rng, len(times))
    from moeless.workloads.arrival_series import ArrivalSeries

    fitted = fit_series(ArrivalSeries("known", times, prompt, output))
    assert fitted.rate == pytest.approx(6.0, rel=0.1)
    assert fitted.correlation == pytest.approx(0.5, abs=0.02)
    assert fitted.log_variance_M.sum() == pytest.approx(0.1, rel=0.4)
    np.testing.assert_allclose(np.interp(0.5, fitted.level_Q, fitted.prompt_Q), 501, rtol=0.03)


def test_another_rate_is_the_same_pattern_at_another_speed():
    slow = load("azure-like", num_requests=500, request_rate=1.0, seed=1)
    fast = load("azure-like", num_requests=500, request_rate=10.0, seed=1)
    np.testing.assert_allclose(slow.time_N, fast.time_N * 10)
    np.testing.assert_array_equal(slow.prompt_N, fast.prompt_N)


def test_lengths_stay_inside_the_traces_range():
    series = load("azure-like", num_requests=20_000)
    fitted = load_fitted()
    assert series.prompt_N.min() >= 1
    assert series.prompt_N.max() <= fitted.prompt_Q[-1]
    assert series.output_N.max() <= fitted.output_Q[-1]


def test_a_broken_description_is_refused():
    with pytest.raises(UserError, match="not a description of fitted arrivals"):
        FittedArrivals.from_json({"rate": 1.0})


def test_too_short_a_trace_is_refused(tmp_path: Path):
    (tmp_path / "short.csv").write_text("arrival,prompt_tokens,output_tokens\n0,1,1\n1,2,2\n")
    with pytest.raises(UserError, match="too few to fit"):
        fit_file(tmp_path / "short.csv", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
