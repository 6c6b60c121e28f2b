"""Memory of a fit on traces that do not fit in it: 58 layers of 256 experts, two lengths.

Gate inputs and expert ids are made as they are read, so that nothing but the fit itself takes memory. Each length runs
in a process of its own; printed is the peak of its anonymous memory, which the kernel cannot drop (pages of scratch
files it can), and the ratio of the longer to the shorter, which is 1 where memory is bounded.

Example: python benchmarks/bench_predictor_memory.py --tokens 1200000 2400000
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from moeless.predictors.fitting import FitInput
from moeless.predictors.gate_reuse import GateReuse
from moeless.predictors.gates import Gates
from moeless.predictors.request_split import split_requests
from moeless.predictors.router import RouterRule
from moeless.predictors.trace_rows import Rows
from moeless.spec import MoESpec, preset

HIDDEN = 64
REQUEST = 512


class MadeTrace:
    """Repeats the routing of one request, made from its gates."""

    def __init__(self, spec: MoESpec, tokens: int) -> None:
        self.spec, self.num_rows, self.path, self.has_router_inputs = spec, tokens, Path("made inputs"), True
        self.requests = SimpleNamespace(first_row=np.arange(0, tokens, REQUEST))
        self.phase_T = np.zeros(tokens, np.uint8)
        rng = np.random.default_rng(0)
        # in 16 bits, as predictors keep gates
        self.gate_LEH = rng.standard_normal((spec.L, spec.E, HIDDEN)).astype(np.float16).astype(np.float32)
        self._input_TLH = rng.standard_normal((REQUEST, spec.L, HIDDEN), np.float32)
        logits_TLE = np.einsum("tlh,leh->tle", self._input_TLH, self.gate_LEH, optimize=True)
        self._ids_TLK = np.argsort(-logits_TLE, -1)[..., : spec.K].astype(np.uint16)

    def router_inputs(self, start: int, stop: int) -> Any:
        """f32 ``[T, L, H]``."""
        return self._input_TLH[np.arange(start, stop) % REQUEST]

    def topk(self, start: int, stop: int) -> Any:
        """u16 ``[T, L, K]``."""
        return self._ids_TLK[np.arange(start, stop) % REQUEST]

    def load_topk(self) -> Any:
        """All ids."""
        return self.topk(0, self.num_rows)


def measure(tokens: int, distances: int) -> tuple[float, float]:
    """Peak of anonymous memory in bytes, and seconds."""
    spec = preset("deepseek-v3")
    spec = dataclasses.replace(spec, name="made", hidden_size=HIDDEN)
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
            peak[0] = max(peak[0], int(line.split()[1]) * 1024)

    trace = MadeTrace(spec, tokens)
    rows: Any = Rows(trace)  # type: ignore[arg-type]
    gates = Gates(trace.gate_LEH, None, None, RouterRule("softmax"), "made gates")
    split = split_requests([""] * len(trace.requests.first_row))
    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        GateReuse.fit(FitInput(rows, split, tuple(range(1, distances + 1)), gates=gates))
    finally:
        done.set()
        watcher.join()
    return float(peak[0]), time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs=2, default=(1_200_000, 2_400_000))
    parser.add_argument("--distances", type=int, default=1)
    args = parser.parse_args()
    peaks = []
    for tokens in args.tokens:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak, seconds = pool.apply(measure, (tokens, args.distances))
        size = (
            f"{tokens * 58 * 8 * 2 / 2**30:.2f} GiB of ids, {tokens * 58 * HIDDEN * 2 / 2**30:.1f} GiB of gate inputs"
        )
        print(f"{tokens:,} tokens ({size}): peak {peak / 2**20:,.0f} MiB, {seconds:.0f} s", flush=True)
        peaks.append(peak)
    print(f"ratio {peaks[1] / peaks[0]:.3f} at {args.tokens[1] / args.tokens[0]:.2f} times the tokens")


if __name__ == "__main__":
    main()
