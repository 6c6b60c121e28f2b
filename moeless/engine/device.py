"""What a rank asks of its device without waiting for it: times of stages, and uploads of small tables."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


class Marks:
    """Points between the stages of a layer.

    On a GPU they are events in the current stream, which are read later, once an iteration: reading one at once would
    hold the host until the queued kernels are done. On a CPU they are this thread's clocks.
    """

    def __init__(self, device: torch.device) -> None:
        self.deferred = device.type == "cuda"
        self._events: list[Any] = []
        self._clocks: list[tuple[float, float]] = []

    def mark(self) -> None:
        """One stage ends here, another begins."""
        if self.deferred:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._clocks.append((time.perf_counter(), time.thread_time()))

    def seconds(self, first: int, last: int, *, own: bool = False) -> float:
        """From one mark to another; ``own``: this thread's processor time, where the device is a CPU.

        On a GPU the device's own time; waits until it has come to the mark.
        """
        if self.deferred:
            self._events[last].synchronize()
            return 1e-3 * float(self._events[first].elapsed_time(self._events[last]))
        return self._clocks[last][own] - self._clocks[first][own]


def upload(values_N: NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array of the host on the device.

    From pinned memory, so that neither waits for the other; torch keeps the pages until the copy is done.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(values_N))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
