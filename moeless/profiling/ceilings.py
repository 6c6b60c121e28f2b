"""What a device can do at most, measured: floating-point rate, memory bandwidth, launch time."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial

import torch

from moeless.profiling.timing import Effort, measure, synchronize

#: Side of the matrix product and bytes of the copy that show what a device reaches.
SIDE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 2**31, "cpu": 2**27}


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of a large matrix product by type, bytes/s of a large copy (read plus written), seconds of a launch."""

    flops: dict[str, float]
    copy_bytes_per_second: float
    read_bytes_per_second: float
    launch_seconds: float
    launch_on_host_seconds: float

    def to_json(self) -> dict[str, object]:
        """As plain data."""
        return asdict(self)


def cache_bytes(device: torch.device) -> int:
    """The last-level cache's size."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20))
    sizes = [32 * 2**20]
    for level in range(4):
        try:
            with open(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size", encoding="ascii") as handle:  # noqa: PTH123
                text = handle.read().strip()
            sizes.append(int(text[:-1]) * 1024 if text.endswith("K") else int(text[:-1]) * 2**20)
        except (OSError, ValueError):
            continue
    return max(sizes[1:], default=sizes[0])


def measure_ceilings(device: torch.device, dtypes: list[torch.dtype], effort: Effort) -> Ceilings:
    """Measure a device with what its own libraries reach on random data."""
    side = SIDE[device.type]
    flops = {}
    for dtype in dtypes:
        pairs = [
            (
                torch.randn(side, side, device=device).to(dtype),
                torch.randn(side, side, device=device).to(dtype),
            )
            for _ in range(2)
        ]
        sample = measure([partial(torch.mm, a, b) for a, b in pairs], device, effort)
        # a ceiling is what was reached, not what was usual
        flops[str(dtype).removeprefix("torch.")] = 2.0 * side**3 / sample.low
        del pairs
    size = max(COPY_BYTES[device.type], 4 * cache_bytes(device))
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copy = measure([lambda: target.copy_(source)], device, effort).low
    read = measure([lambda: source.sum()], device, effort).low
    small = torch.ones(8, device=device)
    launch = measure([lambda: small.add_(1)], device, effort).seconds
    synchronize(device)
    start = time.perf_counter()
    for _ in range(300):
        small.add_(1)
    on_host = (time.perf_counter() - start) / 300
    synchronize(device)
    return Ceilings(flops, 2.0 * size / copy, size / read, launch, on_host)
