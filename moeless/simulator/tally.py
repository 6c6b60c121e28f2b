"""What one layer of one iteration leaves, and the sums over many of them.

Axes: L layers, X the columns below.
"""

from __future__ import annotations

from moeless.costs.layer_time import layer_parts, total_seconds
from moeless.jit import njit

#: Columns of a layer's run: seconds of its experts, exchange, decisions and waiting; most tokens of a GPU over the
#: mean; copies with tokens, copies in its plan, and how many of these were warm; the moment at which it started.
EXPERT_PART, EXCHANGE_PART, CONTROL_PART, STALL_PART, IMBALANCE_PART = 0, 1, 2, 3, 4
ACTIVE_PART, REPLICAS_PART, WARM_PART, START_PART = 5, 6, 7, 8
NUM_PARTS = 9

#: Columns of the tally, sums over (iteration, layer) pairs.
TOTAL, EXPERT, EXCHANGE, MISC, CONTROL, STALL = 0, 1, 2, 3, 4, 5
IMBALANCE, BALANCED, REPLICAS, ACTIVE, WARM, OWN, WHOLE = 6, 7, 8, 9, 10, 11, 12
NUM_TALLIES = 13


@njit(cache=True, nogil=True, allocates=False)
def layer_time(part_X, costs):  # type: ignore[no-untyped-def]
    """A layer's parts as they show."""
    return layer_parts(part_X[EXPERT_PART], part_X[EXCHANGE_PART], part_X[CONTROL_PART], part_X[STALL_PART], costs)


@njit(cache=True, nogil=True, allocates=False)
def tally_layers(part_LX, all_replicas, costs, tally, time_L):  # type: ignore[no-untyped-def]
    """Add the layers of one iteration to the tally, in order; fills ``time_L`` with their seconds.

    Args:
        all_replicas: copies in the plans of all layers as the iteration began.
    """
    for layer in range(len(time_L)):
        part_X = part_LX[layer]
        parts = layer_time(part_X, costs)
        total, ratio, replicas = total_seconds(parts), part_X[IMBALANCE_PART], part_X[REPLICAS_PART]
        tally[TOTAL] += total
        tally[EXPERT] += parts.expert
        tally[EXCHANGE] += parts.all_to_all
        tally[MISC] += parts.misc
        tally[CONTROL] += parts.control
        tally[STALL] += parts.stall
        tally[IMBALANCE] += ratio
        tally[BALANCED] += 1.0 / ratio
        tally[REPLICAS] += replicas
        tally[ACTIVE] += part_X[ACTIVE_PART]
        tally[WARM] += part_X[WARM_PART]
        tally[OWN] += total * replicas
        tally[WHOLE] += total * all_replicas
        time_L[layer] = total
