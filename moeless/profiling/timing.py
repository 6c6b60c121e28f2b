"""Timing of one call on a device: warm-up, repetitions, median with spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

#: A repetition whose thread had less than this share of a core was interrupted by other work.
CORE_SHARE = 0.9

Call = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """Seconds of one call: median, 10th and 90th percentile; repetitions kept and dropped as interrupted."""

    seconds: float
    low: float
    high: float
    kept: int
    dropped: int


@dataclass(frozen=True)
class Effort:
    """How long one sample may take.

    Attributes:
        budget: seconds of measuring per sample, warm-up apart.
        least, most: bounds on the number of repetitions.
    """

    budget: float = 0.15
    least: int = 7
    most: int = 60


QUICK = Effort(budget=0.02, least=3, most=15)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(calls: Sequence[Call], device: torch.device, effort: Effort = Effort()) -> Sample:
    """Time a call.

    Args:
        calls: the same work on different inputs, taken in turn so that no repetition finds its data in a cache.
    """
    return measure_in_turn([calls], device, effort)[0]


def measure_in_turn(groups: Sequence[Sequence[Call]], device: torch.device, effort: Effort = Effort()) -> list[Sample]:
    """Time several calls side by side, one of each in turn: what slows the machine down meets all of them alike.

    Args:
        groups: for each call what :func:`measure` takes.
    """
    return [sample_of(seconds, dropped) for seconds, dropped in repetitions(groups, device, effort)]


def repetitions(groups: Sequence[Sequence[Call]], device: torch.device, effort: Effort) -> list[tuple[np.ndarray, int]]:
    """Seconds of every repetition of each group, and how many were dropped as interrupted."""
    groups = [list(calls) for calls in groups]
    for calls in groups:
        for call in calls[: min(3, len(calls))]:
            call()
    synchronize(device)
    start = time.perf_counter() if device.type == "cuda" else time.thread_time()
    for calls in groups:
        calls[-1]()
    synchronize(device)
    now = time.perf_counter() if device.type == "cuda" else time.thread_time()
    once = max(now - start, 1e-7) / len(groups)
    count = int(np.clip(effort.budget / once, effort.least, effort.most))
    return _on_cuda(groups, device, count) if device.type == "cuda" else _on_cpu(groups, count)


def _on_cuda(groups: Sequence[Sequence[Call]], device: torch.device, count: int) -> list[tuple[np.ndarray, int]]:
    """Device time between events; the queue is kept filled so that the host's launches do not show."""
    events = [
        [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)] for _ in range(len(groups))
    ]
    # a device-side pause lets the host run ahead: without it short kernels are timed with the gaps between launches
    torch.cuda._sleep(min(int(2e6 + 2e5 * count * len(groups)), 40_000_000))
    for i in range(count):
        for calls, pairs in zip(groups, events, strict=True):
            pairs[i][0].record()
            calls[i % len(calls)]()
            pairs[i][1].record()
    torch.cuda.synchronize(device)
    return [(np.array([begin.elapsed_time(end) / 1e3 for begin, end in pairs]), 0) for pairs in events]


def _on_cpu(groups: Sequence[Sequence[Call]], count: int) -> list[tuple[np.ndarray, int]]:
    """With one thread its processor time, which is what the call takes on a core of its own; else wall time.

    Repetitions that other processes interrupted found colder caches: they are dropped while enough remain.
    """
    alone = torch.get_num_threads() == 1
    seconds, share = np.zeros((len(groups), count)), np.ones((len(groups), count))
    for i in range(count):
        for g, calls in enumerate(groups):
            call = calls[i % len(calls)]
            start, cpu = time.perf_counter(), time.thread_time()
            call()
            used, wall = time.thread_time() - cpu, time.perf_counter() - start
            seconds[g, i] = used if alone else wall
            share[g, i] = used / wall if alone else 1.0
    found = []
    for took, got in zip(seconds, share, strict=True):
        clean = got >= CORE_SHARE
        if clean.sum() < min(3, count):
            clean[:] = True
        found.append((took[clean], int((~clean).sum())))
    return found


def sample_of(seconds: np.ndarray, dropped: int) -> Sample:
    """Median and spread of repetitions."""
    low, middle, high = np.quantile(seconds, [0.1, 0.5, 0.9])
    return Sample(float(middle), float(low), float(high), len(seconds), dropped)


def timed_wall(call: Call, device: torch.device) -> float:
    """Wall seconds of one call, the device's queue empty before and after."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start
