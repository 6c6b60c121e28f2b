"""Arrival times with lengths where known, and what can be done to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moeless.contracts import FloatArray, IntArray
from moeless.errors import UserError


@dataclass(frozen=True)
class ArrivalSeries:
    """Requests over time.

    Attributes:
        name: where it comes from.
        time_N: seconds since the workload's start, ascending.
        prompt_N, output_N: tokens of each request, at least one; both None where the source has times only.
        notes: what was dropped or assumed while reading.
    """

    name: str
    time_N: FloatArray
    prompt_N: IntArray | None = None
    output_N: IntArray | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        time = np.asarray(self.time_N, np.float64)
        object.__setattr__(self, "time_N", time)
        if time.ndim != 1 or len(time) == 0:
            raise UserError(f"{self.name} holds no request")
        if not np.isfinite(time).all() or time[0] < 0 or (np.diff(time) < 0).any():
            raise UserError(f"{self.name}: arrival times must be finite, not negative, and ascending")
        if (self.prompt_N is None) != (self.output_N is None):
            raise UserError(f"{self.name} must have both prompt and output lengths, or neither")
        for column in ("prompt_N", "output_N"):
            lengths = getattr(self, column)
            if lengths is not None:
                lengths = np.asarray(lengths, np.int64)
                object.__setattr__(self, column, lengths)
                if lengths.shape != time.shape or (lengths < 1).any():
                    raise UserError(f"{self.name} needs a length of at least 1 for every request")

    def __len__(self) -> int:
        return len(self.time_N)

    @property
    def rate(self) -> float:
        """Mean requests per second, from the first to the last arrival; infinite where all come at once."""
        span = float(self.time_N[-1] - self.time_N[0])
        return (len(self) - 1) / span if span > 0 else math.inf

    @property
    def burstiness(self) -> float:
        """Squared coefficient of variation of the gaps: 0 constant, 1 Poisson, larger in bursts."""
        gaps = np.diff(self.time_N)
        mean = float(gaps.mean()) if len(gaps) else 0.0
        return float(gaps.var()) / mean**2 if mean > 0 else 0.0

    def _take(self, kept: slice, time_N: FloatArray) -> ArrivalSeries:
        prompt = None if self.prompt_N is None else self.prompt_N[kept]
        output = None if self.output_N is None else self.output_N[kept]
        return replace(self, time_N=time_N, prompt_N=prompt, output_N=output)

    def window(self, start: float, stop: float) -> ArrivalSeries:
        """Requests that arrive in [start, stop) seconds; the window's start becomes 0.

        Raises:
            UserError: the window is empty or not one.
        """
        if not 0 <= start < stop:
            raise UserError(f"a window of arrivals needs 0 <= start < stop, got {start:g} to {stop:g} s")
        first, last = np.searchsorted(self.time_N, [start, stop])
        if first == last:
            raise UserError(
                f"{self.name} has no arrival from {start:g} to {stop:g} s; it ends at {self.time_N[-1]:g} s"
            )
        return self._take(slice(first, last), self.time_N[first:last] - start)

    def head(self, count: int) -> ArrivalSeries:
        """The first ``count`` requests, or all where there are fewer.

        Raises:
            UserError: ``count`` is below 1.
        """
        if count < 1:
            raise UserError(f"the number of requests must be at least 1, got {count}")
        return self._take(slice(0, count), self.time_N[:count])

    def scaled(self, factor: float) -> ArrivalSeries:
        """All times multiplied: 0.5 doubles the rate and keeps the pattern.

        Raises:
            UserError: the factor is not a positive number.
        """
        if not (factor > 0 and math.isfinite(factor)):
            raise UserError(f"times can only be scaled by a positive number, got {factor}")
        return replace(self, time_N=self.time_N * factor)

    def at_rate(self, rate: float) -> ArrivalSeries:
        """Times scaled so that the mean rate is ``rate`` requests per second.

        Raises:
            UserError: the rate is not positive, or all requests arrive at once.
        """
        if not (rate > 0 and math.isfinite(rate)):
            raise UserError(f"a request rate must be a positive number per second, got {rate}")
        if not math.isfinite(self.rate):
            raise UserError(f"{self.name} has no rate that could be rescaled: its requests arrive at one moment")
        return self.scaled(self.rate / rate)
