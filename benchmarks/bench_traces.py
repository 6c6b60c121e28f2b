"""Traces: recording overhead, store size and speed, composing.

    python benchmarks/bench_traces.py [--quick] [--only overhead]

Recording overhead is the time of generation with recording over that without, in pairs of one process; the store is
measured on random routing of 24 layers, top-4 of 32 (random ids compress worse than real ones) and, where
``MOELESS_SHARED_DATA`` points to it, on real routing of gpt-oss-20b.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import moeless
from moeless.spec import preset
from moeless.traces import RequestRows, TokenTrace, TokenTraceWriter, TraceInfo, open_trace
from moeless.traces.compose import span_loads
from moeless.traces.generation import Generator, Sampling
from moeless.traces.hf_model import LoadOptions, load_model
from moeless.traces.hooks import RouterCapture
from moeless.traces.info import library_versions
from moeless.traces.recorder import batch_rows, describe
from moeless.workloads import prompts as prompt_sets


def overhead(quick: bool) -> None:
    """Generation with recording over generation without, same prompts, same process."""
    folder = Path(moeless.__file__).parent / "assets" / "model"
    loaded = load_model(str(folder), LoadOptions(device="cpu", dtype="float32"), name="bundled")
    prompts = prompt_sets.load(max_requests=24, seed=0)
    ids = [loaded.tokenizer(prompt.text)["input_ids"][:128] for prompt in prompts]
    limits = [16 if quick else 48] * len(ids)
    batches = [range(start, start + 8) for start in range(0, len(ids), 8)]

    def run(router_inputs: str | None, record: bool) -> tuple[float, float]:
        """Wall and processor seconds."""
        capture = RouterCapture(loaded.model, router_inputs=router_inputs) if record else None
        generator = Generator(loaded.model, loaded.tokenizer, Sampling(), capture)
        start, busy = time.perf_counter(), time.process_time()
        if capture is None:
            for batch in batches:
                generator.run(batch, [ids[i] for i in batch], [limits[i] for i in batch], exact=True)
            return time.perf_counter() - start, time.process_time() - busy
        with capture.recording(), tempfile.TemporaryDirectory() as out:
            info = describe(loaded, router_inputs)
            writer = TokenTraceWriter(Path(out) / "t", info)
            for batch in batches:
                own = [ids[i] for i in batch]
                made = generator.run(batch, own, [limits[i] for i in batch], exact=True)
                writer.append(batch_rows(batch, own, made, [prompts[i] for i in batch]))
            writer.close()
        return time.perf_counter() - start, time.process_time() - busy

    run(None, True)
    for name, inputs, goal in (("without", None, 1.05), ("with", "bfloat16", 1.15)):
        ratios = []
        for turn in range(3 if quick else 9):
            # each is first in every other pair, so that neither meets the warmer machine
            order = (True, False) if turn % 2 else (False, True)
            seconds = {record: run(inputs if record else None, record) for record in order}
            ratios.append([a / b for a, b in zip(seconds[True], seconds[False], strict=True)])
        wall, busy = (sorted(column) for column in zip(*ratios, strict=True))
        print(
            f"recording overhead {name} router inputs: {statistics.median(wall):.3f} of wall time "
            f"({wall[0]:.3f} to {wall[-1]:.3f}), {statistics.median(busy):.3f} of processor time "
            f"({busy[0]:.3f} to {busy[-1]:.3f}); goal at most {goal}"
        )


def store(tokens: int) -> None:
    """Bytes a token, write and read throughput."""
    spec = preset("gpt-oss-20b")
    rng = np.random.default_rng(0)
    topk = np.argsort(rng.random((tokens, spec.L, spec.E), dtype=np.float32), axis=-1)[..., : spec.K].astype(np.uint16)
    weights = rng.random(topk.shape, dtype=np.float32).astype(np.float16)
    _store("random routing", topk, weights)
    shared = Path(os.environ.get("MOELESS_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    path = shared / "routing" / "gpt-oss-20b.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as real:
            _store("gpt-oss-20b routing", real["experts"].astype(np.uint16), real["probs"])


def _store(name: str, topk: np.ndarray, weights: np.ndarray) -> None:
    spec, tokens = preset("gpt-oss-20b"), len(topk)
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        writer = TokenTraceWriter(Path(out) / "t", TraceInfo("tokens", spec, {"model": "benchmark"}))
        for request, first in enumerate(range(0, tokens, 500)):
            rows = slice(first, min(first + 500, tokens))
            writer.append([RequestRows(request, topk[rows], 0, rows.stop - rows.start, weights[rows])])
        info = writer.close()
        wrote = time.perf_counter() - start
        start = time.perf_counter()
        trace = open_trace(Path(out) / "t")
        assert isinstance(trace, TokenTrace)
        trace.load_topk()
        ids_only = time.perf_counter() - start
        trace.weights(0, tokens)
        both = time.perf_counter() - start
    raw = topk.nbytes + weights.nbytes
    size = sum(shard.bytes for shard in info.shards)
    print(f"{name}, {tokens:,} tokens: {size / tokens:.1f} bytes a token, {size / raw:.2f} of the raw arrays")
    print(f"  write {raw / wrote / 1e6:.0f} MB/s; read ids {ids_only:.2f} s, ids and weights {both:.2f} s")


def composing() -> None:
    """Layer iterations per second that can be composed."""
    rng = np.random.default_rng(0)
    topk = rng.integers(0, 32, (50_000, 24, 4)).astype(np.uint16)
    for tokens, turns in ((32, 4000), (512, 500)):
        rows, source = np.sort(rng.integers(0, len(topk), tokens)), rng.integers(0, 8, tokens)
        span_loads(topk, rows, source, 32, 8)
        start = time.perf_counter()
        for _ in range(turns):
            span_loads(topk, rows, source, 32, 8)
        print(f"composing {tokens} tokens: {turns * 24 / (time.perf_counter() - start):,.0f} layer iterations/s")


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=["composing", "store", "overhead"])
    options = parser.parse_args()
    quick, only = options.quick, options.only
    torch.set_num_threads(1)
    print(f"command: python {' '.join(sys.argv)}")
    print(f"versions: {library_versions('torch', 'transformers', 'numpy', 'pyarrow')}")
    print(f"hardware: {platform.machine()}, {os.cpu_count()} CPUs, one thread")
    if only in (None, "composing"):
        composing()
    if only in (None, "store"):
        store(50_000 if quick else 200_000)
    if only in (None, "overhead"):
        overhead(quick)


if __name__ == "__main__":
    main()
