"""Fits the parameters of ``azure_like`` to a request trace, with the goodness of the fit.

python -m moeless.workloads.fit azure-2023-conv.csv out.json
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import ks_2samp, spearmanr

from moeless.contracts import FloatArray, IntArray
from moeless.errors import UserError
from moeless.files import check_writable, sha256, write_json
from moeless.workloads.arrival_files import read_arrivals
from moeless.workloads.arrival_series import ArrivalSeries
from moeless.workloads.azure_like import FittedArrivals

#: Windows, in seconds, over which counts are compared.
WINDOWS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
#: Levels of the quantile tables, finer in the upper tail, where lengths stretch.
LEVELS = np.concatenate([np.arange(0, 199) / 200, [0.9925, 0.995, 0.9975, 0.999, 0.9995, 1.0]])


def dispersion(time_N: FloatArray, windows: tuple[float, ...] = WINDOWS) -> FloatArray:
    """Index of dispersion (variance over mean) of the counts in windows of each length, ``[W]``; 1 is Poisson."""
    out = []
    for window in windows:
        bins = int(time_N[-1] // window)
        counts = np.bincount((time_N // window).astype(np.int64), minlength=bins + 1)[:bins]
        out.append(counts.var() / counts.mean() if bins > 1 else np.nan)
    return np.array(out)


def _expected_dispersion(windows: FloatArray, base: float, parts: FloatArray, rate: float) -> FloatArray:
    """Dispersion of a Cox process whose rate has exponentially decaying autocovariance, plus the gaps' own."""
    total = np.full(len(windows), base)
    for variance, constant in parts:
        total += 2 * rate * variance * constant * (1 - constant / windows * (1 - np.exp(-windows / constant)))
    return total


def fit_series(series: ArrivalSeries) -> FittedArrivals:
    """Fit the model: rate by the mean, modulation and gaps by the dispersion of counts, lengths by quantiles.

    Raises:
        UserError: the trace has no lengths, or fewer than 1,000 requests.
    """
    if series.prompt_N is None or series.output_N is None:
        raise UserError(f"{series.name} has no lengths to fit")
    if len(series) < 1000:
        raise UserError(f"{series.name} has {len(series)} requests, too few to fit; 1,000 are needed")
    observed = dispersion(series.time_N)
    windows = np.array(WINDOWS)
    usable = np.isfinite(observed)

    def residual(x: FloatArray) -> FloatArray:
        base, first, tau_first, second, tau_second = np.exp(x)
        parts = np.array([[first, tau_first], [second, tau_second]])
        return np.log(_expected_dispersion(windows, base, parts, series.rate))[usable] - np.log(observed[usable])

    start = np.log([1.0, 0.05, 10.0, 0.05, 600.0])
    bounds = (np.log([0.2, 1e-4, 1.0, 1e-4, 60.0]), np.log([5.0, 3.0, 60.0, 3.0, 3600.0]))
    base, first, tau_first, second, tau_second = np.exp(least_squares(residual, start, bounds=bounds).x)
    prompt, output = series.prompt_N.astype(np.float64), series.output_N.astype(np.float64)
    return FittedArrivals(
        rate=float(f"{series.rate:.6g}"),
        # the dispersion of a renewal process tends to the squared variation of its gaps: 1 / shape
        gap_shape=round(float(1 / base), 4),
        # a lognormal rate of log-variance s has relative variance exp(s) - 1
        log_variance_M=np.round(np.log1p(np.array([first, second])), 6),
        time_constant_M=np.round(np.array([tau_first, tau_second]), 3),
        level_Q=LEVELS,
        prompt_Q=np.round(np.quantile(prompt, LEVELS), 1),
        output_Q=np.round(np.quantile(output, LEVELS), 1),
        # of the Gaussian copula with that rank correlation
        correlation=round(float(2 * np.sin(np.pi / 6 * spearmanr(prompt, output)[0])), 4),
    )


def goodness(series: ArrivalSeries, fitted: FittedArrivals, seeds: int = 20) -> dict[str, Any]:
    """Distances between the trace and draws of the same size from the fitted model; means over seeds.

    ``ks`` is the two-sample Kolmogorov-Smirnov statistic (0 equal, 1 disjoint).
    """
    assert series.prompt_N is not None
    assert series.output_N is not None
    duration = float(series.time_N[-1])
    ks: dict[str, list[float]] = {"gap": [], "prompt_tokens": [], "output_tokens": [], "requests_per_second": []}
    rates, variations, dispersions, ranks, prompts, outputs = [], [], [], [], [], []
    for seed in range(seeds):
        rng = np.random.default_rng((seed, 0xF17))
        times = fitted.times(rng, None, duration)
        prompt, output = fitted.lengths(rng, len(series))
        ks["gap"].append(_ks(np.diff(series.time_N), np.diff(times)))
        ks["prompt_tokens"].append(_ks(series.prompt_N, prompt))
        ks["output_tokens"].append(_ks(series.output_N, output))
        ks["requests_per_second"].append(_ks(_per_second(series.time_N), _per_second(times)))
        drawn = ArrivalSeries("drawn", times)
        rates.append(drawn.rate)
        variations.append(drawn.burstiness)
        dispersions.append(dispersion(times))
        prompts.append(float(prompt.mean()))
        outputs.append(float(output.mean()))
        ranks.append(float(spearmanr(prompt, output)[0]))
    return {
        "seeds": seeds,
        "ks": {name: round(float(np.mean(values)), 4) for name, values in ks.items()},
        "requests_per_second": _beside(series.rate, rates),
        "gap_squared_variation": _beside(series.burstiness, variations),
        "mean_prompt_tokens": _beside(float(series.prompt_N.mean()), prompts),
        "mean_output_tokens": _beside(float(series.output_N.mean()), outputs),
        "length_rank_correlation": _beside(float(spearmanr(series.prompt_N, series.output_N)[0]), ranks),
        "dispersion_by_window": {
            f"{window:g} s": _beside(observed, [float(d[index]) for d in dispersions])
            for index, (window, observed) in enumerate(zip(WINDOWS, dispersion(series.time_N), strict=True))
        },
    }


def _ks(first: FloatArray | IntArray, second: FloatArray | IntArray) -> float:
    return float(ks_2samp(first, second).statistic)


def _per_second(time_N: FloatArray) -> IntArray:
    return np.bincount(time_N.astype(np.int64))


def _beside(trace: float, drawn: list[float]) -> dict[str, float]:
    return {
        "trace": round(float(trace), 4),
        "drawn_mean": round(float(np.mean(drawn)), 4),
        "drawn_std": round(float(np.std(drawn)), 4),
    }


def fit_file(path: Path, out: Path) -> dict[str, Any]:
    """Fit a request trace and write parameters, goodness of fit and provenance.

    The goodness is given on the trace itself and, so that it cannot be bought by memorising, for a model
    fitted to the first half against the second half.
    """
    check_writable(out)
    series = read_arrivals(path)
    half = float(series.time_N[-1]) / 2
    first, second = series.window(0, half), series.window(half, float(series.time_N[-1]) + 1)
    fitted = fit_series(series)
    report = {
        "parameters": fitted.to_json(),
        "goodness": goodness(series, fitted),
        "goodness_second_half_by_first": goodness(second, fit_series(first)),
        "provenance": {
            "file": path.name,
            "sha256": sha256(path),
            "requests": len(series),
            "seconds": round(float(series.time_N[-1]), 3),
            "command": f"python -m moeless.workloads.fit {path.name} {out.name}",
            "versions": {"python": platform.python_version(), "numpy": np.__version__},
        },
    }
    if path.name.startswith("azure-"):
        report["provenance"]["origin"] = "https://github.com/Azure/AzurePublicDataset, CC-BY-4.0"
    write_json(out, report)
    return report


if __name__ == "__main__":
    fit_file(Path(sys.argv[1]), Path(sys.argv[2]))
