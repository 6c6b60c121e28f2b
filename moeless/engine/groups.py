"""Process groups of one rank: tokens, control messages, moving copies."""

from __future__ import annotations

import datetime
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moeless.engine.interfaces import choose_interface

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

    @property
    def first_local(self) -> int:
        """The first rank of this machine; those of one machine follow each other."""
        return self.rank - self.local_rank


class Meeting:
    """Where the forked ranks of one machine find each other: a port of the loopback address.

    Made before the fork. The first rank takes the listening socket over, so that nobody else can take its port; nothing
    is written to disk, and no host name is looked up.
    """

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = int(self._socket.getsockname()[1])

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def store(self, rank: int, world: int, timeout: datetime.timedelta) -> dist.Store:
        """The store that the ranks share; each calls it once."""
        if rank > 0:
            # where the first rank ends, this address has to be closed
            self.close()
            return dist.TCPStore("127.0.0.1", self.port, world, False, timeout, wait_for_workers=False)
        listening = self._socket.detach()
        return dist.TCPStore(
            "127.0.0.1", self.port, world, True, timeout, wait_for_workers=False, master_listen_fd=listening
        )

    def close(self) -> None:
        """Let this process's hold on the port go."""
        self._socket.close()


def join(
    rank: int,
    world: int,
    *,
    meeting: Meeting | None = None,
    device: str = "cpu",
    local_rank: int | None = None,
    local_world: int | None = None,
    timeout_seconds: float = 120.0,
    move_timeout_seconds: float = MOVE_TIMEOUT_SECONDS,
) -> Ranks:
    """Join the other ranks.

    A rank that ends closes its connections, which the others see at once; the time-out covers one that hangs.

    Args:
        meeting: of forked ranks; None under torchrun, whose environment variables say where ranks meet.
        device: ``cpu`` or ``cuda``.
    """
    local_rank = rank if local_rank is None else local_rank
    local_world = world if local_world is None else local_world
    timeout = datetime.timedelta(seconds=timeout_seconds)
    cuda = device == "cuda"
    where = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(where)
    choose_interface(local_world == world)
    options: dict[str, Any] = {"init_method": "env://"}
    if meeting is not None:
        options = {"store": meeting.store(rank, world, timeout)}
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=world, timeout=timeout, **options)
    data = dist.group.WORLD
    control = dist.new_group(backend="gloo", timeout=timeout) if cuda else data
    moves = None
    if world > 1:
        moves = dist.new_group(timeout=datetime.timedelta(seconds=move_timeout_seconds))
    return Ranks(rank, world, where, data, control, local_rank, local_world, moves)


def from_all(ranks: Ranks, value: Any) -> list[Any]:
    """Every rank's value, in their order."""
    if ranks.world == 1:
        return [value]
    found: list[Any] = [None] * ranks.world
    dist.all_gather_object(found, value, group=ranks.control)
    return found


def leave() -> None:
    """Leave all groups."""
    if dist.is_initialized():
        dist.destroy_process_group()
