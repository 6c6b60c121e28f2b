"""Arrivals and lengths drawn from a fitted description of a request trace.

The model: gaps are gamma-distributed in operational time; real time runs through it at a rate that is
modulated by a lognormal process, the exponential of a sum of Ornstein-Uhlenbeck processes with their own
variances and time constants (a Cox process by time change). Lengths come from quantile tables, joined by a
Gaussian copula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.signal import lfilter
from scipy.special import ndtr

from moeless.contracts import FloatArray, IntArray
from moeless.errors import UserError
from moeless.files import read_json
from moeless.workloads.arrival_processes import gamma_gaps, generate

#: Seconds over which the modulated rate is held constant.
STEP = 1.0


@dataclass(frozen=True)
class FittedArrivals:
    """Parameters of the model.

    Attributes:
        rate: mean requests per second.
        gap_shape: gamma shape of the gaps in operational time.
        log_variance_M, time_constant_M: of each Ornstein-Uhlenbeck process (seconds).
        level_Q: ascending levels from 0 to 1 of the quantile tables.
        prompt_Q, output_Q: tokens at those quantiles.
        correlation: of the Gaussian copula of prompt and output lengths.
    """

    rate: float
    gap_shape: float
    log_variance_M: FloatArray
    time_constant_M: FloatArray
    level_Q: FloatArray
    prompt_Q: FloatArray
    output_Q: FloatArray
    correlation: float

    def to_json(self) -> dict[str, Any]:
        """A dictionary that ``from_json`` takes back."""
        return {
            "rate": self.rate,
            "gap_shape": self.gap_shape,
            "modulation": [
                {"log_variance": float(v), "time_constant": float(t)}
                for v, t in zip(self.log_variance_M, self.time_constant_M, strict=True)
            ],
            "quantile_levels": self.level_Q.tolist(),
            "prompt_quantiles": self.prompt_Q.tolist(),
            "output_quantiles": self.output_Q.tolist(),
            "copula_correlation": self.correlation,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FittedArrivals:
        """Rebuild from ``to_json``.

        Raises:
            UserError: a parameter is missing or of the wrong kind.
        """
        try:
            return cls(
                float(data["rate"]),
                float(data["gap_shape"]),
                np.array([part["log_variance"] for part in data["modulation"]], np.float64),
                np.array([part["time_constant"] for part in data["modulation"]], np.float64),
                np.asarray(data["quantile_levels"], np.float64),
                np.asarray(data["prompt_quantiles"], np.float64),
                np.asarray(data["output_quantiles"], np.float64),
                float(data["copula_correlation"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a description of fitted arrivals: {error!r}") from error

    def times(self, rng: np.random.Generator, count: int | None, duration: float | None) -> FloatArray:
        """Arrival times in seconds: ``count`` of them, or those before ``duration``, or what both allow."""
        gaps = gamma_gaps(1.0, self.gap_shape)
        steps = int(np.ceil((duration if duration is not None else 2.0 * (count or 1) / self.rate) / STEP)) + 16
        work = self._operational(rng, steps)
        if duration is not None:
            clock = np.arange(len(work)) * STEP
            inner = generate(gaps, rng, count, float(np.interp(duration, clock, work)))
        else:
            inner = generate(gaps, rng, count, None)
            while work[-1] <= inner[-1]:
                # the modulation ran low: go on from there, with a process that has forgotten its past
                more = self._operational(rng, steps)
                work = np.concatenate([work, work[-1] + more[1:]])
            clock = np.arange(len(work)) * STEP
        return np.asarray(np.interp(inner, work, clock), np.float64)

    def _operational(self, rng: np.random.Generator, steps: int) -> FloatArray:
        """Expected arrivals up to each step, ``[steps + 1]``."""
        log_rate = np.zeros(steps)
        for variance, constant in zip(self.log_variance_M, self.time_constant_M, strict=True):
            keep = np.exp(-STEP / constant)
            noise = rng.standard_normal(steps) * np.sqrt(variance * (1 - keep**2))
            noise[0] = rng.standard_normal() * np.sqrt(variance)
            log_rate += lfilter([1.0], [1.0, -keep], noise)
        rate = self.rate * np.exp(log_rate - self.log_variance_M.sum() / 2)
        return np.concatenate([[0.0], np.cumsum(rate * STEP)])

    def lengths(self, rng: np.random.Generator, count: int) -> tuple[IntArray, IntArray]:
        """Prompt and output tokens of ``count`` requests."""
        first = rng.standard_normal(count)
        second = self.correlation * first + np.sqrt(1 - self.correlation**2) * rng.standard_normal(count)
        prompt = np.interp(ndtr(first), self.level_Q, self.prompt_Q)
        output = np.interp(ndtr(second), self.level_Q, self.output_Q)
        return np.maximum(np.rint(prompt), 1).astype(np.int64), np.maximum(np.rint(output), 1).astype(np.int64)


def load_fitted(name: str = "azure-2023-conv") -> FittedArrivals:
    """The parameters that ship with the package."""
    path = Path(__file__).resolve().parent.parent / "assets" / "arrivals" / f"{name}.json"
    return FittedArrivals.from_json(read_json(path)["parameters"])
