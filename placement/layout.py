"""Where experts stand without any decision, with the room that a budget leaves.

Axes: E experts, G GPUs.
"""

from __future__ import annotations

import numpy as np

from moeless.contracts import Budget, IntArray
from moeless.errors import UserError
from moeless.spec import MoESpec


def static_gpu_E(num_experts: int, num_gpus: int) -> IntArray:
    """Contiguous blocks of experts over GPUs, ``[E]``, ascending.

    The first ``E mod G`` GPUs hold one expert more; with more GPUs than experts the last GPUs hold none.
    """
    base, more = divmod(num_experts, num_gpus)
    return np.repeat(np.arange(num_gpus), base + (np.arange(num_gpus) < more)).astype(np.int64)


def room_G(budget: Budget, spec: MoESpec, num_gpus: int) -> IntArray:
    """Replicas of one layer that each GPU may hold, by slots as by bytes, ``[G]``.

    Raises:
        UserError: the budget is not one of this cluster, or is negative or not a number.
    """
    slots = np.asarray(budget.slots_G)
    room_bytes = np.asarray(budget.bytes_G, np.float64)
    if slots.shape != (num_gpus,) or room_bytes.shape != (num_gpus,):
        raise UserError(f"the budget is for {len(slots)} GPUs, the cluster has {num_gpus}")
    if np.isnan(room_bytes).any() or (room_bytes < 0).any() or (slots < 0).any() or budget.max_extra < 0:
        raise UserError("a budget's slots, bytes and extra replicas must be numbers of at least 0")
    # a budget built as slots * bytes must not lose a slot to rounding
    by_bytes = np.floor(np.minimum(room_bytes / spec.expert_bytes * (1 + 1e-12), 2.0**31))
    return np.minimum(slots.astype(np.int64), by_bytes.astype(np.int64))


def spare_replicas(room: IntArray, num_experts: int, max_extra: int) -> int:
    """Extras that fit beside one copy of every expert, at most ``max_extra``.

    Raises:
        UserError: not even one copy of every expert fits.
    """
    total = int(room.sum())
    if total < num_experts:
        raise UserError(
            f"memory is too small: {len(room)} GPUs have room for {total} replicas of a layer, "
            f"its {num_experts} experts need at least one each"
        )
    return min(int(max_extra), total - num_experts)


def check_static_fits(room: IntArray, gpu_E: IntArray) -> None:
    """Raise :class:`UserError` where a GPU cannot hold its contiguous block of experts."""
    needed = np.bincount(gpu_E, minlength=len(room))
    if (needed > room).any():
        gpu = int(np.flatnonzero(needed > room)[0])
        raise UserError(
            f"memory is too small: GPU {gpu} has room for {int(room[gpu])} replicas of a layer, "
            f"its static experts are {int(needed[gpu])}"
        )
