"""Which device ``auto`` means: a GPU only where it has room, for a visible GPU may be full of someone else's work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

#: What a program takes of a GPU before it holds anything, bytes.
CONTEXT_BYTES = 10**9


def auto_device(needed_bytes: int = 0) -> tuple[str, str | None]:
    """The device for one process, and a remark where GPUs are there but have no room.

    Args:
        needed_bytes: weights and what else has to fit at once, as far as it is known.
    """
    free = free_gpu_bytes()
    for index, have in enumerate(free):
        if have >= needed_bytes + CONTEXT_BYTES:
            return f"cuda:{index}" if index else "cuda", None
    return "cpu", _full(free, needed_bytes) if free else None


def gpus_with_room(needed_bytes: int, count: int) -> tuple[str, str | None]:
    """``cuda`` where each of the first ``count`` GPUs has room, otherwise ``cpu`` and a remark on the fullest one."""
    free = free_gpu_bytes()[:count]
    if len(free) == count and min(free) >= needed_bytes + CONTEXT_BYTES:
        return "cuda", None
    return "cpu", _full([min(free)], needed_bytes, free.index(min(free))) if free else None


def _full(free: Sequence[int], needed_bytes: int, index: int | None = None) -> str:
    best = max(free)
    which = f"GPU {free.index(best) if index is None else index}"
    return (
        f"{which} has {best / 1e9:.1f} GB free of the {(needed_bytes + CONTEXT_BYTES) / 1e9:.1f} GB that are wanted: "
        "the CPU is used (--device cuda uses the GPU all the same)"
    )


def free_gpu_bytes() -> list[int]:
    """Bytes that are free on each visible GPU; empty where there is none.

    Asked in a process of its own: the question takes memory on every GPU that it is put to, and fails on a full one.
    """
    import torch

    if not torch.cuda.is_available():
        return []
    command = [sys.executable, "-m", "moeless.devices"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    words = ended.stdout.split()
    count = torch.cuda.device_count()
    return [int(word) for word in words] if ended.returncode == 0 and len(words) == count else [0] * count


def main() -> None:
    """Print what is free on each GPU."""
    import torch

    for index in range(torch.cuda.device_count()):
        try:
            free = torch.cuda.mem_get_info(index)[0]
        except RuntimeError:
            # no room for a context, or somebody has the GPU alone
            free = 0
        sys.stdout.write(f"{free}\n")


if __name__ == "__main__":
    main()
