"""A lower bound on a layer's time that no placement and no dispatch can beat.

Axes: E experts, G GPUs.
"""

from __future__ import annotations

import numpy as np

from moeless.contracts import IntArray
from moeless.costs import CostTerms


def layer_bound(load_E: IntArray, terms: CostTerms, num_gpus: int, max_extra: int | None = None) -> float:
    """Least seconds of a layer with true loads ``load_E``, for at most ``max_extra`` copies (None: any number).

    The makespan is at least each of: the mean over GPUs of ``sum_e max(a w_e, b)``, since splitting an expert never
    lowers its summed time; ``b`` times the experts with tokens that some GPU must host by the pigeonhole principle;
    the time of the largest share of an expert that ``k`` copies on different GPUs divide evenly, at least ``b``.
    The fullest GPU exchanges at least the mean of the tokens, rounded up.
    """
    load = np.asarray(load_E, np.float64)
    load = load[load > 0]
    exchange = 2 * (terms.link_seconds * np.ceil(load.sum() / num_gpus) + terms.latency_seconds)
    if not len(load):
        return float(exchange)
    copies = num_gpus if max_extra is None else min(num_gpus, max_extra + 1)
    slowest = max(terms.token_seconds * np.ceil(load.max() / copies), terms.floor_seconds)
    if terms.reduce_max:
        return float(slowest + terms.launch_seconds + exchange)
    work = np.maximum(load * terms.token_seconds, terms.floor_seconds).sum() / num_gpus
    crowded = -(-len(load) // num_gpus) * terms.floor_seconds
    return float(max(work, crowded, slowest) + terms.launch_seconds + exchange)
