"""Times of moving bytes onto a device, and of computing meanwhile."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeless.engine.room import IN_MEMORY
from moeless.machine import file_system
from moeless.profiling.parts import curve_entry
from moeless.profiling.timing import Effort, measure, sample_of, timed_wall

#: Side of the matrix product that runs beside a copy.
OVERLAP_SIDE = {"cuda": 4096, "cpu": 384}


def measure_copies(
    device: torch.device, sizes: Sequence[int], folder: Path, effort: Effort, peer: torch.device | None = None
) -> dict[str, Any]:
    """Every curve of a profile's ``copies``: bytes to seconds.

    On a CPU, host and device are one memory: a copy there is a memory copy, ``host_to_device_pageable`` says so.

    Args:
        folder: on the storage that is read; one that lies in memory is left out.
        peer: a GPU that copies come from, too.
    """
    largest = max(sizes)
    found: dict[str, Any] = {}
    on_device = torch.empty(2 * largest, dtype=torch.uint8, device=device)
    target = torch.empty(largest, dtype=torch.uint8, device=device)

    def over_sizes(source: torch.Tensor, blocking: bool = True) -> dict[str, Any]:
        samples = []
        for size in sizes:
            # several sources where they fit, so that caches do not serve the copy
            starts = range(0, len(source) - size + 1, max(size, largest // 8))
            calls = [_copying(target[:size], source[s : s + size], blocking) for s in starts]
            samples.append(measure(calls[:16], device, effort))
        return curve_entry(sizes, samples, "bytes")

    pageable = torch.randint(0, 255, (2 * largest,), dtype=torch.uint8)
    found["host_to_device_pageable"] = over_sizes(pageable)
    if device.type == "cuda":
        found["host_to_device_pinned"] = over_sizes(pageable.pin_memory(), blocking=False)
        on_device.random_(0, 255)
        found["device_to_device"] = over_sizes(on_device, blocking=False)
        if peer is not None:
            found["peer_to_device"] = over_sizes(on_device.to(peer), blocking=False)
    if file_system(folder) not in IN_MEMORY:
        found["disk_to_host"] = _disk(sizes, folder)
    return found


def describe_storage(folder: Path) -> str:
    """What kind of storage ``disk_to_host`` was read from, or why it was not measured."""
    kind = file_system(folder)
    if kind in IN_MEMORY:
        return f"{folder.resolve()} lies in memory ({kind}), which tells nothing about storage"
    return kind or "unknown"


def _copying(target: torch.Tensor, source: torch.Tensor, blocking: bool) -> Callable[[], object]:
    return lambda: target.copy_(source, non_blocking=not blocking)


def _disk(sizes: Sequence[int], folder: Path) -> dict[str, Any]:
    """Reading a file that the page cache was asked to drop first."""
    largest = max(sizes)
    content = np.random.default_rng(0).integers(0, 255, largest, np.uint8)
    target = np.empty(largest, np.uint8)
    samples = []
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".moeless-disk-") as handle:
        handle.write(content.tobytes())
        handle.flush()
        os.fsync(handle.fileno())
        for size in sizes:
            seconds = []
            for _ in range(5):
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                seconds.append(timed_wall(partial(_read, handle.name, target[:size]), torch.device("cpu")))
            samples.append(sample_of(np.array(seconds), 0))
    return curve_entry(sizes, samples, "bytes")


def _read(path: str, target: np.ndarray) -> None:
    with Path(path).open("rb", buffering=0) as handle:
        view, done = memoryview(target.data), 0
        while done < len(target):
            got = handle.readinto(view[done:])
            if not got:
                break
            done += got


def measure_overlap(device: torch.device, dtype: torch.dtype, size: int) -> dict[str, float]:
    """A copy onto the device while it computes: each alone, then both.

    ``hidden`` is the share of the shorter one's time that the other hides: 1 is full concurrency, 0 none.
    """
    side = OVERLAP_SIDE[device.type]
    a, b = (torch.empty(side, side, dtype=dtype, device=device).normal_() for _ in range(2))
    source = torch.randint(0, 255, (size,), dtype=torch.uint8)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        source = source.pin_memory()
    repeat = 1

    def compute() -> None:
        for _ in range(repeat):
            torch.mm(a, b)

    def copy() -> None:
        target.copy_(source, non_blocking=True)

    compute()
    copy()
    copy_time = float(np.median([timed_wall(copy, device) for _ in range(7)]))
    repeat = max(1, round(copy_time / max(min(timed_wall(compute, device) for _ in range(3)), 1e-7)))
    compute_time = float(np.median([timed_wall(compute, device) for _ in range(7)]))
    both_call = _both_on_cuda(compute, copy, device) if device.type == "cuda" else _both_on_cpu(compute, copy)
    both_call()
    both = float(np.median([timed_wall(both_call, device) for _ in range(7)]))
    hidden = (compute_time + copy_time - both) / min(compute_time, copy_time)
    return {
        "bytes": float(size),
        "compute_seconds": compute_time,
        "copy_seconds": copy_time,
        "both_seconds": both,
        "hidden": float(np.clip(hidden, 0.0, 1.0)),
    }


def _both_on_cuda(compute: Callable[[], None], copy: Callable[[], None], device: torch.device) -> Callable[[], None]:
    side_stream = torch.cuda.Stream(device)

    def run() -> None:
        side_stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side_stream):
            copy()
        compute()
        torch.cuda.current_stream(device).wait_stream(side_stream)

    return run


def _both_on_cpu(compute: Callable[[], None], copy: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        mover = threading.Thread(target=copy)
        mover.start()
        compute()
        mover.join()

    return run
