"""Seconds to fit all methods that read gate inputs on the bundled model's trace, on all cores.

Example: moeless trace bundled TRACE --router-inputs --max-requests 240 --max-new-tokens 96 --temperature 0.8
    then python benchmarks/bench_bundled_fits.py TRACE
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

from moeless.predictors.train_evaluate import FitJob, run_fit

METHODS = ("gate_reuse", "layer_aware", "from_scratch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--distances", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    whole, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            started, began = time.perf_counter(), time.process_time()
            run_fit(FitJob(args.trace, method, tuple(range(1, args.distances + 1))), Path(folder) / method)
            seconds, used = time.perf_counter() - started, time.process_time() - began
            print(f"{method:>12}: {seconds:6.1f} s, {used:6.1f} s of CPU time", flush=True)
    seconds = time.perf_counter() - whole
    print(f"{'all':>12}: {seconds:6.1f} s, {time.process_time() - cpu:6.1f} s of CPU time, {args.threads} threads")
    print(f"{'':>12}  {seconds / 180:.2f} of 3 minutes")


if __name__ == "__main__":
    main()
