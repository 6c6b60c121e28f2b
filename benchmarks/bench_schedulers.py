"""Scheduling alone: the Azure conversation hour under a clock in which execution costs a fixed time.

Prints iterations and tokens per second of scheduling, and peak memory. With a zero-cost clock every request
ends before the next arrives, so there are millions of iterations of one token; with a real iteration time
batches form.

    python benchmarks/bench_schedulers.py [arrivals.csv]
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np

from moeless.contracts import Request
from moeless.workloads import arrivals
from moeless.workloads.schedulers import build


def run(name: str, requests: list[Request], seconds_per_iteration: float, **options: object) -> None:
    """Drive one scheduler to its end and print its rates."""
    scheduler = build(name, requests, 8, **options)
    now, iterations, tokens = 0.0, 0, 0
    begin = time.perf_counter()
    while not scheduler.done:
        iteration = scheduler.next(now)
        if iteration is None:
            arrival = scheduler.next_arrival(now)
            assert arrival is not None
            now = arrival
            continue
        iterations += 1
        tokens += iteration.tokens
        now += seconds_per_iteration
        scheduler.complete(iteration, now)
    spent = time.perf_counter() - begin
    assert tokens == sum(request.prompt_tokens + request.output_tokens - 1 for request in requests)
    print(
        f"{name:11s} {seconds_per_iteration * 1e3:4.0f} ms/iteration  {spent:6.2f} s  {iterations:9,d} iterations  "
        f"{iterations / spent:9,.0f} iterations/s  {tokens / spent:12,.0f} tokens/s  "
        f"{tokens / iterations:7.1f} tokens/iteration  piled up: {scheduler.queueing().piled_up}"
    )


def main() -> None:
    """Both schedulers, several clocks."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "arrivals" / "azure-2023-conv.csv"
    source = sys.argv[1] if len(sys.argv) > 1 else str(default) if default.is_file() else "azure-like"
    series = arrivals.load(source, num_requests=None if source != "azure-like" else 19366)
    requests = arrivals.to_requests(series)
    print(f"{' '.join(sys.argv)}: {Path(source).name}, {len(requests):,} requests, 8 ranks")
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.machine()}, {platform.processor()}")
    for seconds in (0.0, 0.01, 0.03):
        run("continuous", requests, seconds)
        run("one-second", requests, seconds)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
