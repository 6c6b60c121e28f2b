"""The live engine on this machine: wall-clock ratios to static EP, dispatch overhead, launch and kill times.

Two ranks with one thread each, so that each has a core of its own where there are two: the only CPU setting in which
wall time says something about balance. Layer time is from the gate's output to the combined hidden states.

    python benchmarks/bench_engine.py [--requests N] [--repeat N]
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from moeless.contracts import LayerPlan
from moeless.engine.bench import LiveBench, LiveConfig
from moeless.engine.core import PartTimes, run_layer
from moeless.engine.exchange import Exchange
from moeless.engine.ffn import GatedFFN, silu_gate
from moeless.engine.groups import Ranks
from moeless.engine.launch import ForkedRanks, run_forked
from moeless.errors import RunFailed
from moeless.machine import cores
from moeless.placement.static import static_plan

POLICIES = ("static", "eplb:history", "moeless:history", "moeless:gate_reuse", "elastic:history", "oracle")


def policies_table(host: str, requests: int, repeat: int) -> None:
    """Mean and median layer wall time of each policy over static's, runs interleaved, median of the repeats."""
    ratios: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(repeat):
        config = LiveConfig(
            policies=POLICIES,
            arrivals="poisson:50",
            max_requests=requests,
            batching="one-second",
            replan_seconds=0.5,
            host=host,
            predict=False,
            seed=seed,
        )
        bench = LiveBench(config)
        with tempfile.TemporaryDirectory() as out:
            cells = bench.run(Path(out))
        base = cells[0].layer
        for cell in cells:
            layer = cell.layer
            found = (layer.mean_ms / base.mean_ms, layer.p50_ms / base.p50_ms, layer.imbalance)
            ratios.setdefault(cell.policy, []).append(found)
    print(f"\n{host} host, bundled model, 2 ranks, {requests} requests in one-second batches, {repeat} workloads")
    print(f"{'policy':22s} {'mean / static':>14s} {'median / static':>16s} {'imbalance':>10s}")
    for policy, values in ratios.items():
        middle = [statistics.median(column) for column in zip(*values, strict=True)]
        print(f"{policy:22s} {middle[0]:14.3f} {middle[1]:16.3f} {middle[2]:10.3f}")


def overhead(tokens: int, hidden: int, width: int, experts: int, repeat: int) -> None:
    """The elastic layer on one rank against the same grouped products on tokens sorted by expert."""
    random = torch.Generator().manual_seed(0)
    slots = {
        "up": torch.randn(experts, 2 * width, hidden, generator=random),
        "down": torch.randn(experts, hidden, width, generator=random),
    }
    rows = torch.randn(tokens, hidden, generator=random)
    topk = torch.randint(0, experts, (tokens, 2), generator=random)
    weights = torch.rand(tokens, 2, generator=random)
    ffn = GatedFFN({name: tuple(value.shape[1:]) for name, value in slots.items()}, torch.float32, silu_gate)
    exchange = Exchange(Ranks(0, 1, torch.device("cpu"), None, None, 0, 1))
    plan: LayerPlan = static_plan(0, experts, 1)
    quota = np.bincount(topk.reshape(-1).numpy(), minlength=experts)[None]
    slot_of = {expert: expert for expert in range(experts)}

    def elastic() -> None:
        run_layer(
            rows,
            topk,
            weights,
            plan=plan,
            quota_SR=quota,
            slot_of_expert=slot_of,
            slots=slots,
            ffn=ffn,
            exchange=exchange,
            times=PartTimes(),
        )

    def direct() -> None:
        flat = topk.reshape(-1)
        order = torch.argsort(flat, stable=True)
        out = ffn(rows[order // 2], torch.bincount(flat, minlength=experts).tolist(), slots)
        back = torch.empty_like(out)
        back[order] = out
        (back.view(tokens, 2, hidden) * weights[..., None]).sum(1)

    times: dict[str, list[float]] = {"elastic": [], "direct": []}
    for index in range(repeat + 3):
        for name, call in (("elastic", elastic), ("direct", direct)):
            begin = time.perf_counter()
            call()
            if index >= 3:
                times[name].append(time.perf_counter() - begin)
    mine, plain = statistics.median(times["elastic"]), statistics.median(times["direct"])
    print(
        f"one rank, {tokens:5d} tokens, H {hidden}, I {width}, E {experts}: elastic {1e3 * mine:8.3f} ms, "
        f"sorted grouped products {1e3 * plain:8.3f} ms, ratio {mine / plain:.3f}"
    )


def launching() -> None:
    """Seconds to start and end eight empty ranks, and from a kill to the sentence."""
    begin = time.perf_counter()
    run_forked(lambda _: None, 8)
    started = time.perf_counter() - begin

    def hang(rank: int) -> None:
        if rank == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    begin = time.perf_counter()
    try:
        ForkedRanks(hang, 8).wait()
    except RunFailed as failure:
        print(f"8 ranks: fork and end {started:.2f} s; kill to sentence {time.perf_counter() - begin:.2f} s: {failure}")


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{' '.join(sys.argv)}")
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, "
        f"{cores()} cores, one thread a rank"
    )
    launching()
    with torch.inference_mode():
        overhead(64, 192, 96, 16, 300)
        overhead(1024, 192, 96, 16, 100)
        overhead(1024, 1024, 768, 16, 10)
    for host in ("transformers", "megatron"):
        policies_table(host, given.requests, given.repeat)


if __name__ == "__main__":
    main()
