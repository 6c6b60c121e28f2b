"""Whether other work runs on a device."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from moeless.errors import RunFailed, UserError
from moeless.machine import cores

#: A spinning thread that gets less than this share of a core shares it.
FAIR_SHARE = 0.95
#: Load average per core above which the machine counts as busy.
LOAD_PER_CORE = 0.35
#: Device memory, in bytes, that an idle GPU may show as taken (driver, display).
IDLE_BYTES = 2 * 2**30
IDLE_UTILISATION = 10.0


def core_share(threads: int = 1, seconds: float = 0.2) -> float:
    """Share of a core that each of so many spinning threads gets, on the mean."""
    with ThreadPoolExecutor(threads) as spinning:
        return sum(spinning.map(_spin, [seconds] * threads)) / threads


def _spin(seconds: float) -> float:
    block = bytes(2**16)
    cpu, start = time.thread_time(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        # threads hash side by side
        hashlib.sha256(block)
    return (time.thread_time() - cpu) / (time.perf_counter() - start)


def cpu_findings(ranks: int = 1) -> list[str]:
    """Why this machine's processor is busy, one clause each; empty when it is not.

    Where this process may use a part of the cores only, the load average counts other people's work beside them: there
    as many threads are tried as ranks will run.
    """
    found = []
    usable, load = cores(), os.getloadavg()[0]
    restricted = usable < (os.cpu_count() or 1)
    if not restricted and load > LOAD_PER_CORE * usable:
        found.append(f"the load average is {load:.2f} on {usable} cores")
    threads = min(ranks, usable) if restricted else 1
    share = core_share(threads)
    if share < FAIR_SHARE:
        what = "a spinning thread gets" if threads == 1 else f"{threads} spinning threads get"
        found.append(f"{what} {share:.0%} of a core")
    return found


def cuda_findings(device: torch.device) -> list[str]:
    """Why a GPU is busy, one clause each; empty when it is not."""
    found = []
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free - torch.cuda.memory_reserved(device)
    if taken > IDLE_BYTES:
        found.append(f"{taken / 2**30:.1f} GiB of its memory are taken")
    utilisation = _utilisation(torch.cuda.get_device_properties(device))
    if utilisation is not None and utilisation > IDLE_UTILISATION:
        found.append(f"its utilisation is {utilisation:.0f} %")
    return found


def _utilisation(properties: object) -> float | None:
    """Utilisation in per cent by the driver's own tool; None where it cannot say."""
    tool = shutil.which("nvidia-smi")
    uuid = getattr(properties, "uuid", None)
    if tool is None or uuid is None:
        return None
    query = [tool, f"--id=GPU-{uuid}", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        return float(answer.strip())
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def resolve_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:N``; a GPU becomes the current one, on which events and streams are made.

    Raises:
        UserError: the name is none of these, or there is no such GPU.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: this machine or this build of torch has no CUDA device; use --device cpu")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def devices_of(device: torch.device, ranks: int) -> list[torch.device]:
    """Each rank's device: the GPUs from the chosen one on, or the processor for all.

    Raises:
        UserError: there are fewer GPUs.
    """
    if device.type == "cpu":
        return [device] * ranks
    last, count = device.index + ranks - 1, torch.cuda.device_count()
    if last < count:
        return [torch.device("cuda", index) for index in range(device.index, last + 1)]
    if device.index == 0:
        raise UserError(f"--ranks {ranks} needs as many GPUs, there are {count}")
    raise UserError(
        f"--device {device} with --ranks {ranks} means GPUs {device.index} to {last}; there are {count}, counted from 0"
    )


def check_idle(device: torch.device, force: bool, ranks: int = 1) -> list[str]:
    """What keeps the devices of so many ranks busy.

    Raises:
        RunFailed: they are busy and ``force`` is not set.
    """
    if device.type == "cpu":
        found = cpu_findings(ranks)
    else:
        chosen = devices_of(device, ranks)
        found = [
            clause if ranks == 1 else f"GPU {one.index}: {clause}" for one in chosen for clause in cuda_findings(one)
        ]
    if found and not force:
        raise RunFailed(f"the device is busy ({'; '.join(found)}); wait, or measure all the same with --force")
    return found
