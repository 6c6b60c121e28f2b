"""Process groups of one rank: tokens, control messages, moving copies."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

#: Seconds after which a copy that a peer does not send is taken from host memory.
MOVE_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Ranks:
    """What a rank knows of itself and the others.

    Attributes:
        data: group that carries tokens (NCCL on CUDA, gloo on CPU).
        control: gloo group for counts, forecasts, readiness and clocks; None uses ``data``.
        moves: group of the thread that exchanges expert copies; None where there is one rank.
        local_world: ranks of this machine; they share one host memory.
    """

    rank: int
    world: int
    device: torch.device
    data: Any
    control: Any
    local_rank: int
    local_world: int
    moves: Any = None


def join(
    rank: int,
    world: int,
    *,
    init_method: str,
    device: str = "cpu",
    local_rank: int | None = None,
    local_world: int | None = None,
    timeout_seconds: float = 120.0,
    move_timeout_seconds: float = MOVE_TIMEOUT_SECONDS,
) -> Ranks:
    """Join the other ranks.

    A rank that ends closes its connections, which the others see at once; the time-out covers one that hangs.

    Args:
        init_method: ``file:///path`` (a file that does not exist yet) or ``env://`` under torchrun.
        device: ``cpu`` or ``cuda``.
    """
    local_rank = rank if local_rank is None else local_rank
    local_world = world if local_world is None else local_world
    timeout = datetime.timedelta(seconds=timeout_seconds)
    cuda = device == "cuda"
    where = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(where)
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=init_method, rank=rank, world_size=world, timeout=timeout
    )
    data = dist.group.WORLD
    control = dist.new_group(backend="gloo", timeout=timeout) if cuda else data
    moves = None
    if world > 1:
        moves = dist.new_group(timeout=datetime.timedelta(seconds=move_timeout_seconds))
    return Ranks(rank, world, where, data, control, local_rank, local_world, moves)


def leave() -> None:
    """Leave all groups."""
    if dist.is_initialized():
        dist.destroy_process_group()
