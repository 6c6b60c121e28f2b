"""What this process may use of the machine: processor cores and memory, containers' limits included.

A container sees the whole machine's processors and memory. What it may use of them stands in its control group
(cgroup), as a processor quota and a memory limit; those of the groups above it hold as well. Both versions of control
groups are read.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator, MutableMapping
from functools import lru_cache
from pathlib import Path

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
#: Variables that tell libraries how many threads to start; they count the machine's cores otherwise.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
#: A version 1 limit above this means none.
_UNLIMITED_BYTES = 2**60


@lru_cache(maxsize=1)
def cores() -> int:
    """Processor cores that this process may use: its affinity mask within its control group's quota, at least 1.

    A quota of 2.5 cores counts as 2.
    """
    quota = processor_quota()
    return affinity() if quota is None else max(1, min(affinity(), int(quota)))


def affinity() -> int:
    """Processor cores on which this process may be scheduled."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_quota(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> float | None:
    """Cores' worth of processor time that the control group grants, None where it sets no quota.

    Args:
        proc, cgroups: where the kernel's process and control group file systems are mounted.
    """
    found = []
    for folder in _groups("cpu", proc, cgroups):
        words = _read(folder / "cpu.max").split()
        if not words:
            words = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def limit_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let numerical libraries start as many threads as there are :func:`cores`; a value that is set stays.

    They follow the affinity mask by themselves, so only a processor quota calls for it. It has to come before they are
    imported.
    """
    if cores() < affinity():
        for name in _THREADS:
            environment.setdefault(name, str(cores()))


def memory_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Bytes of memory that this process may use at the most: the machine's, or its control group's limit."""
    limits = [limit for limit, _ in _memory_limits(proc, cgroups)]
    return min([_meminfo(proc, "MemTotal"), *limits])


def available_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Bytes of memory that can still be had without swapping, the control group's limit included."""
    left = [limit - used for limit, used in _memory_limits(proc, cgroups)]
    return max(0, min([_meminfo(proc, "MemAvailable"), *left]))


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user can still write into the file system that holds a folder."""
    return shutil.disk_usage(folder).free


def file_system(path: Path, proc: Path = _PROC) -> str:
    """Type of the file system that holds a path, such as ``ext4`` or ``nfs4``; empty where the kernel does not tell."""
    where, kind, depth = path.resolve(), "", 0
    for line in _read(proc / "self" / "mountinfo").splitlines():
        mount, _, source = line.partition(" - ")
        if len(mount.split()) < 5 or not source.split():
            continue
        # blanks are written as \040
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), mount.split()[4]))
        # of several mounts on one point the last is the one that is seen
        if where.is_relative_to(point) and len(point.parts) >= depth:
            kind, depth = source.split()[0], len(point.parts)
    return kind


def processor_name(proc: Path = _PROC) -> str:
    """The processor's model, as its maker calls it."""
    lines = _read(proc / "cpuinfo").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_limits(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each control group that has a limit; cached file pages do not count as used."""
    for folder in _groups("memory", proc, cgroups):
        newer = (folder / "memory.max").exists()
        limit = _read(folder / ("memory.max" if newer else "memory.limit_in_bytes")).strip()
        if not limit.isdigit() or int(limit) >= _UNLIMITED_BYTES:
            continue
        used = _read(folder / ("memory.current" if newer else "memory.usage_in_bytes")).strip()
        wanted = "inactive_file" if newer else "total_inactive_file"
        fields = dict(line.split() for line in _read(folder / "memory.stat").splitlines() if len(line.split()) == 2)
        cached = int(fields.get(wanted, 0))
        yield int(limit), max(0, (int(used) if used.isdigit() else 0) - cached)


def _groups(controller: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """Folders of this process's control group and of those above it, for one controller.

    A container often sees its own group as the root, whatever path the kernel names.
    """
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if not names:
            root = cgroups if (cgroups / "cgroup.controllers").exists() else cgroups / "unified"
        elif controller in names.split(","):
            root = next((found for found in (cgroups / names, cgroups / controller) if found.is_dir()), cgroups)
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            folder = root.joinpath(*parts[:depth])
            if folder.is_dir():
                yield folder


def _meminfo(proc: Path, name: str) -> int:
    for line in _read(proc / "meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
