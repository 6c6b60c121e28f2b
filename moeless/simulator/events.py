"""The queue of timed events that moves the simulated clock: one for all pools of GPUs."""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Any, Protocol


class Kind(IntEnum):
    """What happens. Of events that take effect at the same moment, the kinds listed first come first."""

    #: A lost GPU has restarted, or one that was taken is there.
    GPU_BACK = auto()
    #: After all GPUs were given back, others have started.
    CONTAINERS_STARTED = auto()
    #: The other GPUs have noticed a failure, and go on.
    FAILURE_NOTICED = auto()
    #: A GPU is lost, or a copy dies.
    FAILURE = auto()
    #: A request arrives at a model that had none.
    ARRIVAL = auto()
    #: All weights of a model that was woken are in memory.
    WEIGHTS_LOADED = auto()
    #: A model among others has been idle for a keep-alive.
    MODEL_EXPIRED = auto()
    #: All models of a pool have been idle for a keep-alive.
    POOL_EXPIRED = auto()
    #: A GPU that was lost may be taken again.
    GPU_AVAILABLE = auto()
    #: For a keep-alive, fewer GPUs were needed than are held.
    GPUS_UNNEEDED = auto()
    #: The copies of GPUs that are to be given back have been loaded on the others.
    COPIES_MOVED = auto()
    #: A pool may begin its next iteration.
    TURN = auto()


class Owner(Protocol):
    """Whom an event happens to."""

    def happen(self, event: Event) -> None: ...


@dataclass(eq=False, slots=True)
class Event:
    """Something that happens to its owner, once each time that it is scheduled.

    Attributes:
        subject: what it is about: a model, a failure.
        seconds: when it happens, or last happened, since the workload's start; infinity where it is not expected.
        waiting: it is scheduled and has not happened.
    """

    queue: EventQueue
    kind: Kind
    owner: Owner
    subject: Any = None
    seconds: float = math.inf
    order: int | None = None

    @property
    def waiting(self) -> bool:
        """Whether it is scheduled and has not happened."""
        return self.order is not None

    def schedule(self, seconds: float) -> None:
        """Have it happen then, and not when it was scheduled before; at infinity it does not happen."""
        if seconds != self.seconds or (self.order is None and seconds < math.inf):
            self.seconds, self.order = seconds, None
            if seconds < math.inf:
                self.queue.add(self)

    def cancel(self) -> None:
        """Have it not happen."""
        self.schedule(math.inf)


class EventQueue:
    """Events in order of time; at equal times by kind, then in the order in which they were scheduled."""

    def __init__(self) -> None:
        # an event that was scheduled anew stays in the heap under its former order, and is passed over there
        self._heap: list[tuple[float, Kind, int, Event]] = []
        self._orders = itertools.count()

    def add(self, event: Event) -> None:
        """Take an event in; :meth:`Event.schedule` does."""
        event.order = next(self._orders)
        heapq.heappush(self._heap, (event.seconds, event.kind, event.order, event))

    def next_time(self, before: float = math.inf) -> float:
        """When the next event happens, ``before`` where none does earlier."""
        heap = self._heap
        while heap and heap[0][3].order != heap[0][2]:
            heapq.heappop(heap)
        return min(heap[0][0], before) if heap else before

    def pop(self) -> Event | None:
        """The next event, from now on no longer waiting; None where there is none."""
        if self.next_time() == math.inf:
            return None
        event = heapq.heappop(self._heap)[3]
        event.order = None
        return event
