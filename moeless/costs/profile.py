"""A hardware profile: times of one model's expert shapes on one kind of device.

``moeless profile`` writes it, ``profile_reader`` reads it, the ``measured`` cost model interpolates it.

Axes: A numbers of active experts, N tokens per expert, B message sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeless.contracts import FloatArray
from moeless.errors import UserError
from moeless.machine import cores, processor_name
from moeless.spec import MoESpec

#: Shapes that must equal the served model's: they decide an expert's work.
SHAPES = ("hidden_size", "expert_intermediate_size", "expert_matrices")


@dataclass(frozen=True)
class Curve:
    """Seconds over one quantity (tokens or bytes), ascending in both, with the measured spread."""

    x: FloatArray
    seconds: FloatArray

    def at(self, x: float) -> float:
        """Linear between points, the first value below them, the last segment's slope above them; 0 for none."""
        if x <= 0:
            return 0.0
        if x <= self.x[-1] or len(self.x) == 1:
            return float(np.interp(x, self.x, self.seconds))
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.x[-1] - self.x[-2])
        return float(self.seconds[-1] + slope * (x - self.x[-1]))


@dataclass(frozen=True)
class ExpertGrid:
    """Time of A equally loaded experts of N tokens each, ``seconds_AN``, by one kernel in one type.

    Non-decreasing in both axes, and an added token never costs less when more experts are active (the mixed
    differences are not negative): interpolation then is monotone for any loads.
    """

    kernel: str
    dtype: str
    tokens_N: FloatArray
    active_A: FloatArray
    seconds_AN: FloatArray
    leave_one_out: Mapping[str, float]


@dataclass(frozen=True)
class Exchange:
    """One direction of an all-to-all among ``ranks``: fullest rank's bytes to seconds.

    ``uniform`` is every rank sending evenly to all; ``hot`` is every rank sending to one. ``engine_expert`` and
    ``engine_rest`` are what the engine's own layer took among these ranks beyond its parts, over a rank's tokens: its
    expert part, and everything else, the gather included. None where that was not measured.
    """

    ranks: int
    backend: str
    uniform: Curve
    hot: Curve
    gather_seconds: float
    engine_expert: Curve | None = None
    engine_rest: Curve | None = None


@dataclass(frozen=True)
class HardwareProfile:
    """A checked profile; ``document`` is the whole JSON."""

    name: str
    path: str
    experts: tuple[ExpertGrid, ...]
    parts: Mapping[str, Curve]
    copies: Mapping[str, Curve]
    exchange: tuple[Exchange, ...]
    links: str | None
    dispatch_seconds: Mapping[str, float]
    plan_seconds: Mapping[str, float]
    document: Mapping[str, Any] = field(repr=False)

    @property
    def device(self) -> str:
        """The device's name."""
        return str(self.document["machine"]["name"])

    def elsewhere(self) -> str | None:
        """A remark where this machine's processor is not the one that the times are of; None for those of a GPU."""
        machine = self.document["machine"]
        if machine.get("device") != "cpu":
            return None
        here, count = processor_name(), machine.get("host_cores")
        other = self.device != here and f"those of {self.device}, this machine has {here}"
        fewer = count != cores() and f"of {count} cores, this process may use {cores()}"
        if not other and (not fewer or count is None):
            return None
        return (
            f"the times in profile {self.name}, by which planners plan, are {other or fewer}: measure this machine "
            f"with `moeless profile --model {self.document['model']['name']} --device cpu --out FILE` and give "
            "--costs measured:FILE"
        )

    def grid(self, kernel: str | None = None, dtype: str | None = None) -> ExpertGrid:
        """The grid of a kernel and type, by default those the profile names.

        Raises:
            UserError: the profile has no such grid.
        """
        kernel = kernel or str(self.document["default_kernel"])
        dtype = dtype or str(self.document["default_dtype"])
        for grid in self.experts:
            if (grid.kernel, grid.dtype) == (kernel, dtype):
                return grid
        have = ", ".join(f"{grid.kernel}/{grid.dtype}" for grid in self.experts)
        raise UserError(f"profile {self.path} has no expert times of {kernel}/{dtype}; it has: {have}")

    def check_model(self, spec: MoESpec) -> None:
        """Refuse a model of other expert shapes.

        Raises:
            UserError: hidden size, expert width or number of matrices differ.
        """
        model = self.document["model"]
        wrong = [
            f"{key} {model[key]} instead of {getattr(spec, key)}" for key in SHAPES if model[key] != getattr(spec, key)
        ]
        if wrong:
            raise UserError(
                f"profile {self.path} was measured for model {model['name']!r}, not for {spec.name!r} "
                f"({', '.join(wrong)}); make one with `moeless profile --model {spec.name}`"
            )
