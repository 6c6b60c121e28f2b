"""Every measurement that needs a device, in one command: profiles, kernels over their floors, emulated layers.

    python benchmarks/bench_gpu.py --device cuda --routing gpt-oss-20b.npz --out DIR

writes DIR/cuda-<model>.json for six models, DIR/kernels.json, DIR/emulated.json, DIR/gap.json, and DIR/bench.txt with
the tables, within eight minutes. Each is written as soon as it is there, and one that is there is not measured again:
after an interruption, or where the time ran out, the same command goes on. Without a GPU the same program runs on the
CPU at the bundled model's shapes. Needs torch, numpy and safetensors; no network. Where numba is absent planning runs
in plain Python, and the control times of the profiles say so by being absent.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

# before torch: one thread per emulated rank
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu_gap
import gpu_layers
import torch
from gap_protocol import load_routing

from moeless import __version__
from moeless.allocator import keep_freed_memory
from moeless.cluster import cluster
from moeless.costs.measured import MeasuredCosts
from moeless.costs.profile_reader import find_profile, load_profile
from moeless.errors import RunFailed, UserError
from moeless.files import read_json, write_json
from moeless.jit import COMPILED
from moeless.profiling.busy import check_idle, resolve_device
from moeless.profiling.ceilings import cache_bytes, measure_ceilings
from moeless.profiling.emulate import RankWork
from moeless.profiling.hotpath import HotPath
from moeless.profiling.run import DTYPES, ProfileOptions, make_plan, profile_model
from moeless.profiling.timing import QUICK, Effort
from moeless.spec import preset

PRESETS_CUDA = ("gpt-oss-20b", "mixtral-8x7b", "phi-3.5-moe", "llama-4-scout", "qwen3-30b-a3b", "deepseek-v3")
#: Tokens of a rank in the kernels' table.
KERNEL_TOKENS = {"cuda": (32, 256, 2048, 8192), "cpu": (32, 1024)}
#: Seconds that a stage needs on a GPU; less left, and it waits for the next call.
NEEDS = {"kernels": 45.0, "emulated": 60.0, "gap": 30.0 if COMPILED else 90.0}


class Bench:
    """One run: what was asked, the device, the clock."""

    def __init__(self, asked: argparse.Namespace, device: torch.device, busy: list[str]) -> None:
        self.asked, self.device, self.busy, self.out = asked, device, busy, asked.out
        self.cuda = device.type == "cuda"
        self.stop = time.monotonic() + asked.seconds
        default = PRESETS_CUDA if self.cuda else ("bundled",)
        self.models: tuple[str, ...] = tuple(asked.models or default)
        self.dtype = DTYPES["bfloat16" if self.cuda else "float32"]
        full = Effort(0.03, 7, 50) if self.cuda else Effort(0.1, 7, 40)
        self.effort = full if self.cuda or asked.full else QUICK
        self.waiting: list[str] = []
        self.out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds left of the budget."""
        return self.stop - time.monotonic()

    def say(self, text: str) -> None:
        """Onto the screen and into the file of tables."""
        print(text, flush=True)
        with (self.out / "bench.txt").open("a", encoding="utf-8") as handle:
            handle.write(text + "\n")

    def stage(self, name: str, needs: float, make: Callable[[], Any]) -> Any:
        """A stage's result, from its file where there is one; None where the time does not suffice."""
        path = self.out / f"{name}.json"
        if path.is_file():
            print(f"{name}: found in {path}", flush=True)
            return read_json(path)
        if needs > self.left():
            self.say(f"{name}: {needs:.0f} s needed, {self.left():.0f} s left; the same command goes on here")
            self.waiting.append(name)
            return None
        start = time.monotonic()
        result = make()
        write_json(path, result)
        self.say(f"{name}: {time.monotonic() - start:.1f} s")
        if self.cuda:
            torch.cuda.empty_cache()
        return result

    def profile(self, model: str) -> None:
        """One profile, as ``moeless profile`` makes it."""
        spec = preset(model)
        # off a GPU this program shows that it runs: small grids unless asked otherwise
        quick = not (self.cuda or self.asked.full)
        options = ProfileOptions(
            1 if self.cuda else 2, links="h100-dgx" if self.cuda else None, quick=quick, force=True
        )
        plan = make_plan(spec, str(self.device), options)
        needs = plan.seconds if self.cuda else 0.0
        document = self.stage(
            f"{self.device.type}-{model}", needs, lambda: profile_model(spec, plan, options, self.out)
        )
        if document is not None:
            grid = document["experts"][0]
            share = grid["best_flops"] / document["ceilings"]["flops"][grid["dtype"]]
            median = 100 * grid["leave_one_out"].get("tokens_median", float("nan"))
            self.say(
                f"profile {model}: {grid['kernel']} {grid['best_flops'] / 1e12:.2f} TFLOP/s, {share:.0%} of the matrix "
                f"product's; leave-one-out median {median:.1f} % over tokens"
            )

    def kernels(self) -> dict[str, Any]:
        """Every kernel of the hot path over its floor."""
        spec = preset(self.models[0])
        ceilings = measure_ceilings(self.device, [self.dtype], self.effort)
        rows: list[dict[str, Any]] = []
        failed: dict[str, str] = {}
        for seed, tokens in enumerate(KERNEL_TOKENS[self.device.type]):
            path = HotPath(
                spec,
                self.device,
                self.dtype,
                tokens,
                gpu_layers.RANKS,
                ceilings,
                self.effort,
                seed + self.asked.seed,
                triton=not self.asked.no_triton,
            )
            rows += [{"tokens": tokens, **asdict(row), "over_floor": row.over_floor} for row in path.rows()]
            failed |= path.failed
        self.say(f"\n{spec.name}, {self.dtype}: kernel | shape | µs | floor µs | over floor | error against float64")
        for r in rows:
            mark = "" if r["correct"] else "  WRONG"
            self.say(
                f"{r['kernel']} | {r['shape']} | {r['seconds'] * 1e6:.1f} | {r['floor'] * 1e6:.2f} | "
                f"{r['over_floor']:.2f} | {r['error']:.1e}{mark}"
            )
        for kernel, why in failed.items():
            self.say(f"# {kernel} did not run: {why}")
        return {"model": spec.name, "ceilings": ceilings.to_json(), "rows": rows, "failed": failed}

    def costs(self) -> tuple[Any, MeasuredCosts] | None:
        """The real routing at the first model's shapes, and its measured costs; None where one is missing."""
        source = self.asked.profile or str(self.out / f"{self.device.type}-{self.models[0]}.json")
        try:
            routing = gpu_layers.shapes_of(load_routing(self.asked.routing), self.models[0])
            profile = load_profile(find_profile(source))
        except (SystemExit, OSError, UserError) as missing:
            self.say(f"emulated layers and gap: skipped, {missing}")
            return None
        machine = cluster("h100x8" if self.cuda else "cpu8")
        return routing, MeasuredCosts(routing.spec, machine, profile=profile)

    def emulated(self, routing: Any, costs: MeasuredCosts) -> dict[str, Any]:
        """Emulated layers beside the predictions."""
        regimes = gpu_layers.REGIMES
        if not self.cuda and not self.asked.full:
            regimes = tuple(regime for regime in regimes if regime.tokens <= 1024)
        pairs = self.asked.pairs or (8 if self.cuda else 2)
        copies = -(-routing.spec.E // gpu_layers.RANKS) + 1
        work = RankWork(routing.spec, costs.grid.kernel, self.dtype, self.device, copies, cache_bytes(self.device))
        cells = gpu_layers.emulate(routing, costs, work, self.effort, pairs, self.left, regimes)
        self.say("\n" + "\n".join(gpu_layers.lines(cells)))
        return {"cells": [asdict(cell) for cell in cells], "warnings": list(costs.warnings)}

    def gap(self, routing: Any, costs: MeasuredCosts) -> dict[str, Any]:
        """The planners' gap closed under the measured costs."""
        cells = gpu_gap.gap_table(routing, costs, self.asked.gap_pairs, self.left, gpu_layers.REGIMES)
        self.say("\n" + "\n".join(gpu_gap.lines(cells)))
        return {"cells": [asdict(cell) for cell in cells], "warnings": list(costs.warnings)}

    def run(self) -> int:
        """The stages in order of worth; 0 when all went well, 1 when a kernel is wrong."""
        name = torch.cuda.get_device_name(self.device) if self.cuda else platform.processor() or platform.machine()
        self.say(f"# {shlex.join(['bench_gpu.py', *sys.argv[1:]])}")
        self.say(f"# {name}; torch {torch.__version__}, Python {platform.python_version()}, moeless {__version__}")
        if not COMPILED:
            self.say("# numba is not installed: plans are made in plain Python, control times are not measured")
        for finding in self.busy:
            self.say(f"# busy: {finding}")
        self.profile(self.models[0])
        with torch.no_grad():
            found = self.costs()
            if found is not None:
                self.stage("emulated", NEEDS["emulated"] if self.cuda else 0.0, lambda: self.emulated(*found))
            for model in self.models[1:]:
                self.profile(model)
            if found is not None:
                self.stage("gap", NEEDS["gap"] if self.cuda else 0.0, lambda: self.gap(*found))
            # last: a kernel that breaks the device takes nothing else with it
            kernels = self.stage("kernels", NEEDS["kernels"] if self.cuda else 0.0, self.kernels)
        done = "; run the same command again for " + ", ".join(self.waiting) if self.waiting else ""
        self.say(f"\nwritten to {self.out}; {self.asked.seconds - self.left():.0f} s{done}")
        return int(kernels is not None and not all(row["correct"] for row in kernels["rows"]))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--routing", type=Path, help="gpt-oss-20b.npz; default: the development data")
    parser.add_argument("--profile", help="profile to emulate with, in place of one measured now")
    parser.add_argument("--out", type=Path, default=Path("results/runs/bench_gpu"))
    parser.add_argument("--models", nargs="+", help="presets to profile; kernels and layers are the first one's")
    parser.add_argument("--pairs", type=int, help="(iteration, layer) pairs a regime of the emulated layers")
    parser.add_argument(
        "--gap-pairs", type=int, default=72 if COMPILED else 24, help="pairs a regime of the gap-closed table"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the kernels' random inputs")
    parser.add_argument("--seconds", type=float, default=450, help="time budget")
    parser.add_argument("--full", action="store_true", help="full grids on the CPU too")
    parser.add_argument("--no-triton", action="store_true", help="torch's own operations only")
    parser.add_argument("--force", action="store_true", help="measure although the device is busy")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run everything; 0 when all went well, 1 when a kernel is wrong or the device is busy."""
    asked = parse(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        device = resolve_device(asked.device)
        busy = check_idle(device, asked.force or device.type == "cpu")
        return Bench(asked, device, busy).run()
    except (UserError, RunFailed) as error:
        print(f"bench_gpu: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
