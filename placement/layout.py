"""Where experts stand without any decision, with the room that a budget leaves.

Axes: E experts, G GPUs.
"""

from __future__ import annotations

from functools import lru_cache

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


def static_layout(budget: Budget, spec: MoESpec, num_gpus: int) -> tuple[IntArray, IntArray, int]:
    """Static GPU of each expert ``[E]``, room of each GPU ``[G]``, extras that fit; shared by calls, so read only.

    Raises:
        UserError: a GPU has no room for its static experts, or the budget is not one of this cluster.
    """
    slots, room_bytes = np.asarray(budget.slots_G), np.asarray(budget.bytes_G)
    return _layout(
        slots.tobytes(), slots.dtype.str, slots.shape, room_bytes.tobytes(), room_bytes.dtype.str, room_bytes.shape,
        budget.max_extra, spec, num_gpus,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _layout(
    slots: bytes,
    slots_type: str,
    slots_shape: tuple[int, ...],
    room_bytes: bytes,
    bytes_type: str,
    bytes_shape: tuple[int, ...],
    max_extra: int,
    spec: MoESpec,
    num_gpus: int,
) -> tuple[IntArray, IntArray, int]:
    budget = Budget(
        np.frombuffer(slots, slots_type).reshape(slots_shape),
        np.frombuffer(room_bytes, bytes_type).reshape(bytes_shape),
        max_extra,
    )
    gpu_E = static_gpu_E(spec.E, num_gpus)
    room = room_G(budget, spec, num_gpus)
    check_static_fits(room, gpu_E)
    return gpu_E, room, spare_replicas(room, spec.E, max_extra)
