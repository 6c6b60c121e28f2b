"""The plans in force as compiled loops see them: one padded row per layer.

Axes: L layers, R replicas in a plan's order (padded).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeless.contracts import BoolArray, FloatArray, Int32Array, IntArray
from moeless.jit import njit


class Plans(NamedTuple):
    """A plan of each layer.

    Attributes:
        share_LR: each copy's part of its expert's tokens, in the layers of ``fixed_L``; of no columns where no plan
            of the policy fixes shares ahead.
    """

    expert_LR: Int32Array
    gpu_LR: Int32Array
    primary_LR: BoolArray
    count_L: IntArray
    share_LR: FloatArray
    fixed_L: BoolArray


def room_for(layers: int, widest: int, shares: bool) -> Plans:
    """Rows for plans of at most ``widest`` replicas, with or without shares."""
    shape = (layers, widest)
    return Plans(
        np.full(shape, -1, np.int32),
        np.full(shape, -1, np.int32),
        np.zeros(shape, np.bool_),
        np.zeros(layers, np.int64),
        np.zeros((layers, widest if shares else 0)),
        np.zeros(layers, np.bool_),
    )


@njit(cache=True, nogil=True, inline="always")
def shares_of(layer, plans):  # type: ignore[no-untyped-def]
    """A layer's shares, none where they are not fixed ahead."""
    return plans.share_LR[layer, : plans.count_L[layer] if plans.fixed_L[layer] else 0]
