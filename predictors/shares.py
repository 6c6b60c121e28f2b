"""Load shares from past loads, with their checks.

Axes: E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import Context, FloatArray
from moeless.errors import UserError


def share_of(load_E: NDArray[Any], num_experts: int, what: str) -> FloatArray | None:
    """A load as shares that sum to 1; None where it is zero everywhere.

    Raises:
        UserError: another length, a NaN or a negative entry.
    """
    load = np.asarray(load_E, np.float64)
    if load.shape != (num_experts,):
        raise UserError(f"{what} must hold {num_experts} experts, got shape {load.shape}")
    if not np.isfinite(load).all() or (load < 0).any():
        raise UserError(f"{what} holds a negative value or one that is not finite")
    total = float(load.sum())
    return load / total if total > 0 else None


def history_share(context: Context, num_experts: int) -> FloatArray | None:
    """The context's history as shares, None at a cold start."""
    if context.history_E is None:
        return None
    return share_of(context.history_E, num_experts, "the history")


def last_share(context: Context, num_experts: int) -> FloatArray | None:
    """The previous iteration's load as shares, None where there was none."""
    if context.last_load_E is None:
        return None
    return share_of(context.last_load_E, num_experts, "the last load")


def known_share(context: Context, num_experts: int) -> tuple[FloatArray, str]:
    """The best that past loads give, with its name: history, else last, else equal shares."""
    history_E = history_share(context, num_experts)
    if history_E is not None:
        return history_E, "history"
    last_E = last_share(context, num_experts)
    if last_E is not None:
        return last_E, "last"
    return np.full(num_experts, 1.0 / num_experts), "uniform"


def proportional(weight_E: FloatArray, total: float) -> FloatArray:
    """Weights scaled so that they sum to ``total``; equal ones where all are zero."""
    weight = np.maximum(weight_E, 0.0)
    mass = float(weight.sum())
    if mass <= 0:
        return np.full(len(weight), total / len(weight))
    return weight * (total / mass)
