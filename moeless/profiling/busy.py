"""Whether other work runs on a device."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

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


def core_share(seconds: float = 0.2) -> float:
    """Share of a core that a spinning thread gets."""
    cpu, start = time.thread_time(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        pass
    return (time.thread_time() - cpu) / (time.perf_counter() - start)


def cpu_findings() -> list[str]:
    """Why this machine's processor is busy, one clause each; empty when it is not."""
    found = []
    load, usable = os.getloadavg()[0], cores()
    if load > LOAD_PER_CORE * usable:
        found.append(f"the load average is {load:.2f} on {usable} cores")
    share = core_share()
    if share < FAIR_SHARE:
        found.append(f"a spinning thread gets {share:.0%} of a core")
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
    """``cpu``, ``cuda`` or ``cuda:N``.

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
    return torch.device("cuda", index)


def check_idle(device: torch.device, force: bool) -> list[str]:
    """What keeps a device busy.

    Raises:
        RunFailed: it is busy and ``force`` is not set.
    """
    found = cuda_findings(device) if device.type == "cuda" else cpu_findings()
    if found and not force:
        raise RunFailed(f"the device is busy ({'; '.join(found)}); wait, or measure all the same with --force")
    return found
