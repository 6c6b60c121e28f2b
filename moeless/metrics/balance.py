"""How evenly a layer's load lies on the GPUs.

Averages are over layers of the per-layer ratio, never the ratio of averages: the latter hides that
different layers overload different GPUs.
"""

from __future__ import annotations

import numpy as np

from moeless.contracts import FloatArray


def imbalance(load_xG: FloatArray) -> FloatArray:
    """Maximum over mean along the last axis (at least 1); 1 where there is no load."""
    load = np.asarray(load_xG, np.float64)
    mean = load.mean(-1)
    return np.asarray(np.divide(load.max(-1), mean, out=np.ones_like(mean), where=mean > 0))


def balancedness(load_xG: FloatArray) -> FloatArray:
    """Mean over maximum along the last axis (at most 1); 1 where there is no load."""
    return 1.0 / imbalance(load_xG)


def gap_closed(static: FloatArray, policy: FloatArray, bound: FloatArray) -> float:
    """Ratio of sums (T_static − T) / (T_static − T_bound); 0 is static EP, 1 the lower bound.

    Raises:
        ValueError: static EP already is at the bound, so that there is no gap.
    """
    gap = float(np.sum(static) - np.sum(bound))
    if gap <= 0:
        raise ValueError("static EP is at the bound: no gap to close")
    return float(np.sum(static) - np.sum(policy)) / gap
