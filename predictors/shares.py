"""Load shares from loads, with their checks.

Axes: E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import FloatArray
from moeless.errors import UserError


def share_of(load_E: NDArray[Any] | None, num_experts: int, what: str) -> FloatArray | None:
    """A load as shares that sum to 1; None where there is none, or it is zero everywhere.

    Args:
        what: what the load is called in an error.

    Raises:
        UserError: another length, a NaN or a negative entry.
    """
    if load_E is None:
        return None
    load = np.asarray(load_E, np.float64)
    if load.shape != (num_experts,):
        raise UserError(f"{what} must hold {num_experts} experts, got shape {load.shape}")
    if not np.isfinite(load).all() or (load < 0).any():
        raise UserError(f"{what} holds a negative value or one that is not finite")
    total = float(load.sum())
    return load / total if total > 0 else None


def proportional(weight_E: FloatArray, total: float) -> FloatArray:
    """Weights scaled so that they sum to ``total``; equal ones where all are zero."""
    weight = np.maximum(weight_E, 0.0)
    mass = float(weight.sum())
    if mass <= 0:
        return np.full(len(weight), total / len(weight))
    return weight * (total / mass)
