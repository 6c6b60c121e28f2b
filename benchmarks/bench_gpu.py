"""Every measurement that needs a device, in one command: profiles, kernels over their floors, emulated layers.

On a GPU:  python benchmarks/bench_gpu.py --device cuda --routing gpt-oss-20b.npz --out DIR
writes DIR/cuda-<model>.json for six models and DIR/bench.json, within eight minutes. Without one the same program runs
on the CPU at the bundled model's shapes. Needs torch, numpy, numba and scipy; no network.

Axes: S source ranks, R replicas, E experts.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

# before torch: one thread per emulated rank
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from gap_protocol import REGIMES, Regime, Routing, bound_seconds, history_share_LE, load_routing, sample_rows

from moeless import __version__
from moeless.cluster import Cluster, cluster
from moeless.contracts import Budget, Forecast, LayerPlan, PlanInput
from moeless.costs.measured import MeasuredCosts
from moeless.costs.profile_reader import find_profile, load_profile
from moeless.errors import RunFailed, UserError
from moeless.files import write_json
from moeless.placement import PLANNERS, Planner
from moeless.profiling.busy import check_idle, resolve_device
from moeless.profiling.ceilings import Ceilings, cache_bytes, measure_ceilings
from moeless.profiling.control import measure_control
from moeless.profiling.emulate import EmulatedLayer, RankWork, emulate_layer
from moeless.profiling.hotpath import HotPath
from moeless.profiling.run import DTYPES, ProfileOptions, make_plan, profile_model
from moeless.profiling.timing import QUICK, Effort
from moeless.spec import MoESpec, preset

PRESETS_CUDA = ("gpt-oss-20b", "mixtral-8x7b", "phi-3.5-moe", "llama-4-scout", "qwen3-30b-a3b", "deepseek-v3")
POLICIES = ("static", "eplb", "moeless", "elastic")
RANKS = 8
SEED = 0


@dataclass(frozen=True)
class Cell:
    """One (regime, policy) of the emulated layers: means over its pairs, milliseconds, and errors."""

    regime: str
    policy: str
    pairs: int
    measured_ms: float
    predicted_ms: float
    expert_measured_ms: float
    expert_error_mean: float
    expert_error_abs: float
    total_error_mean: float
    gap_measured: float | None
    gap_predicted: float | None


class Clock:
    """Seconds left of the budget."""

    def __init__(self, seconds: float) -> None:
        self.stop = time.monotonic() + seconds

    def left(self) -> float:
        return self.stop - time.monotonic()


def say(text: str) -> None:
    print(text, flush=True)


def write_profiles(
    models: tuple[str, ...], device: torch.device, options: ProfileOptions, out: Path, clock: Clock
) -> None:
    """One profile a model, as ``moeless profile`` makes it."""
    for model in models:
        spec = preset(model)
        plan = make_plan(spec, str(device), options)
        if plan.seconds > clock.left():
            say(f"profile {model}: skipped, {plan.seconds:.0f} s needed and {clock.left():.0f} s left")
            continue
        start = time.monotonic()
        document = profile_model(spec, plan, options, out)
        write_json(out / f"{document['name']}.json", document)
        grid = document["experts"][0]
        share = grid["best_flops"] / document["ceilings"]["flops"][grid["dtype"]]
        say(
            f"profile {model}: {time.monotonic() - start:.1f} s; {grid['kernel']} "
            f"{grid['best_flops'] / 1e12:.2f} TFLOP/s, {share:.0%} of the matrix product's; leave-one-out median "
            f"{100 * grid['leave_one_out'].get('tokens_median', float('nan')):.1f} % over tokens"
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()


def kernel_table(
    spec: MoESpec, device: torch.device, dtype: torch.dtype, ceilings: Ceilings, effort: Effort, sizes: tuple[int, ...]
) -> list[dict[str, object]]:
    """Every kernel of the hot path over its floor."""
    rows = []
    for seed, tokens in enumerate(sizes):
        for row in HotPath(spec, device, dtype, tokens, RANKS, ceilings, effort, seed).rows():
            rows.append({"tokens": tokens, **asdict(row), "over_floor": row.over_floor})
    say(f"\n{spec.name}, {dtype}: kernel | shape | µs | floor µs | over floor | error against float64")
    for r in rows:
        mark = "" if r["correct"] else "  WRONG"
        say(
            f"{r['kernel']} | {r['shape']} | {r['seconds'] * 1e6:.1f} | {r['floor'] * 1e6:.1f} | "
            f"{r['over_floor']:.2f} | {r['error']:.1e}{mark}"
        )
    return rows


def loads_by_source(routing: Routing, rows: np.ndarray, layer: int, ranks: int) -> np.ndarray:
    """Tokens of each source rank for each expert, ``[S, E]``: ranks own consecutive tokens."""
    rank_T = np.arange(len(rows)) * ranks // len(rows)
    chosen_TK = routing.topk_TLK[rows, layer].astype(np.int64)
    flat = rank_T[:, None] * routing.spec.E + chosen_TK
    return np.bincount(flat.reshape(-1), minlength=ranks * routing.spec.E).reshape(ranks, routing.spec.E)


def plan_for(
    planner: Planner, regime: Regime, layer: int, share_E: np.ndarray, costs: MeasuredCosts, budget: Budget
) -> LayerPlan:
    """A plan made ahead from the history's mean load."""
    mean_E = share_E * regime.tokens * costs.spec.K
    forecast = Forecast(mean_E, mean_E, regime.tokens, "history")
    return planner.plan_layer(
        PlanInput(layer, regime.phase, forecast),
        spec=costs.spec,
        cluster=costs.cluster,
        costs=costs,
        budget=budget,
        params=planner.params(),
    )


def emulate(
    routing: Routing,
    costs: MeasuredCosts,
    work: RankWork,
    effort: Effort,
    regimes: tuple[Regime, ...],
    pairs: int,
    clock: Clock,
) -> list[Cell]:
    """All policies on the same real loads, one slot of extras per GPU, plans from history."""
    spec, share_LE = routing.spec, history_share_LE(routing)
    budget = Budget.even(spec.E, RANKS, 1, spec.expert_bytes)
    planners = {name: PLANNERS.get(name) for name in POLICIES if name in PLANNERS.names()}
    cells: list[Cell] = []
    for regime in regimes:
        if clock.left() < 20:
            say(f"emulated {regime.name}: skipped, the time is up")
            continue
        random = np.random.default_rng([SEED, int(regime.phase), regime.tokens])
        layers = random.choice(spec.L, pairs, replace=pairs > spec.L)
        drawn = [
            (
                int(layer),
                loads_by_source(routing, sample_rows(routing, regime, random, routing.test), int(layer), RANKS),
            )
            for layer in layers
        ]
        found: dict[str, list[EmulatedLayer]] = {}
        for name, planner in planners.items():
            found[name] = []
            for layer, load_SE in drawn:
                plan = plan_for(planner, regime, layer, share_LE[layer], costs, budget)
                quota_SR = planner.dispatch(
                    load_SE,
                    plan,
                    np.ones(plan.R, np.bool_),
                    spec=spec,
                    cluster=costs.cluster,
                    costs=costs,
                    params=planner.params(),
                )
                found[name].append(emulate_layer(quota_SR, plan, costs, work, effort))
        bound = bound_seconds(np.stack([load_SE.sum(0) for _, load_SE in drawn]), costs).sum()
        cells += [summarise(regime, name, found[name], found["static"], float(bound)) for name in found]
    return cells


def summarise(
    regime: Regime, policy: str, layers: list[EmulatedLayer], static: list[EmulatedLayer], bound: float
) -> Cell:
    """Means over the pairs; gap closed with the bound of the cost model's linear terms, where there is a gap."""
    count = len(layers)
    measured, predicted = sum(row.total for row in layers), sum(row.predicted.total for row in layers)
    static_measured, static_predicted = sum(row.total for row in static), sum(row.predicted.total for row in static)
    error = np.array([row.expert_error for row in layers])

    def gap(static_time: float, policy_time: float) -> float | None:
        room = static_time - bound
        return (static_time - policy_time) / room if room > 0.02 * static_time else None

    return Cell(
        regime=regime.name,
        policy=policy,
        pairs=count,
        measured_ms=1e3 * measured / count,
        predicted_ms=1e3 * predicted / count,
        expert_measured_ms=1e3 * sum(row.expert for row in layers) / count,
        expert_error_mean=float(error.mean()),
        expert_error_abs=float(np.abs(error).mean()),
        total_error_mean=float(np.mean([row.total_error for row in layers])),
        gap_measured=gap(static_measured, measured),
        gap_predicted=gap(static_predicted, predicted),
    )


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def show_cells(cells: list[Cell]) -> None:
    say(
        "\nregime | policy | measured ms | predicted ms | error on experts, absolute | on layer | gap closed, predicted"
    )
    for c in cells:
        say(
            f"{c.regime} | {c.policy} | {c.measured_ms:.3f} | {c.predicted_ms:.3f} | {c.expert_error_mean:+.1%}, "
            f"{c.expert_error_abs:.1%} | {c.total_error_mean:+.1%} | "
            f"{figure(c.gap_measured)}, {figure(c.gap_predicted)}"
        )


def shapes_of(routing: Routing, model: str) -> Routing:
    """The routing's experts at another model's FFN shapes."""
    other = preset(model)
    changed = {
        "hidden_size": other.hidden_size,
        "expert_intermediate_size": other.expert_intermediate_size,
        "dtype": "float32" if model == "bundled" else other.dtype,
        "expert_dtype": "float32" if model == "bundled" else "bfloat16",
    }
    spec = MoESpec.from_json(routing.spec.to_json() | changed)
    return Routing(routing.topk_TLK, routing.offsets, routing.train, routing.test, spec)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--routing", type=Path, help="gpt-oss-20b.npz; default: the development data")
    parser.add_argument("--profile", help="profile to emulate with, in place of one measured now")
    parser.add_argument("--out", type=Path, default=Path("results/runs/bench_gpu"))
    parser.add_argument("--models", nargs="*", help="presets to profile")
    parser.add_argument("--pairs", type=int, help="(iteration, layer) pairs a regime")
    parser.add_argument("--seconds", type=float, default=450, help="time budget")
    parser.add_argument("--full", action="store_true", help="full grids on the CPU too")
    parser.add_argument("--force", action="store_true", help="measure although the device is busy")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run everything; 0 when all went well, 1 when a kernel is wrong or the device is busy."""
    asked = parse(arguments)
    clock = Clock(asked.seconds)
    torch.set_num_threads(1)
    try:
        device = resolve_device(asked.device)
        # off a GPU this program shows that it runs: a busy machine is said, not refused
        busy = check_idle(device, asked.force or device.type == "cpu")
        return bench(asked, device, busy, clock)
    except (UserError, RunFailed) as error:
        say(f"bench_gpu: {error}")
        return 1


def bench(asked: argparse.Namespace, device: torch.device, busy: list[str], clock: Clock) -> int:
    """The stages in order of worth: profiles, kernels, emulated layers."""
    cuda = device.type == "cuda"
    models = tuple(asked.models) if asked.models is not None else PRESETS_CUDA if cuda else ("bundled",)
    main_model = "gpt-oss-20b" if cuda else "bundled"
    dtype = DTYPES["bfloat16" if cuda else "float32"]
    effort = Effort(0.03, 7, 50) if cuda else QUICK if not asked.full else Effort(0.05, 5, 25)
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    say(f"# {shlex.join(['bench_gpu.py', *sys.argv[1:]])}")
    say(f"# {name}; torch {torch.__version__}, Python {platform.python_version()}, moeless {__version__}")
    for finding in busy:
        say(f"# busy: {finding}")
    asked.out.mkdir(parents=True, exist_ok=True)
    links = "h100-dgx" if cuda else None
    options = ProfileOptions(1 if cuda else 2, links=links, quick=not (cuda or asked.full), force=True)
    write_profiles(models, device, options, asked.out, clock)
    result: dict[str, object] = {"command": sys.argv, "device": name, "torch": torch.__version__, "busy": busy}
    with torch.no_grad():
        ceilings = measure_ceilings(device, [dtype], effort)
        result["ceilings"] = ceilings.to_json()
        sizes = (32, 256, 2048, 8192) if cuda else (32, 1024)
        result["kernels"] = kernel_table(preset(main_model), device, dtype, ceilings, effort, sizes)
        result["emulated"] = emulated_stage(asked, device, dtype, main_model, effort, clock)
    write_json(asked.out / "bench.json", result)
    say(f"\nwritten to {asked.out}; {asked.seconds - clock.left():.0f} s")
    return int(not all(row["correct"] for row in result["kernels"]))


def emulated_stage(
    asked: argparse.Namespace, device: torch.device, dtype: torch.dtype, model: str, effort: Effort, clock: Clock
) -> dict[str, object] | None:
    """Emulated layers beside the simulator's predictions, and the planners' dispatch times."""
    cuda = device.type == "cuda"
    try:
        routing = shapes_of(load_routing(asked.routing), model)
    except SystemExit as missing:
        say(f"emulated layers: skipped, {missing}")
        return None
    made = asked.out / f"{device.type}-{model}.json"
    source = asked.profile or (str(made) if made.is_file() else None)
    if source is None:
        say(f"emulated layers: skipped, no profile of {model}")
        return None
    machine: Cluster = cluster("h100x8" if cuda else "cpu8")
    costs = MeasuredCosts(routing.spec, machine, profile=load_profile(find_profile(source)))
    regimes = REGIMES if cuda or asked.full else tuple(r for r in REGIMES if r.tokens <= 1024)
    pairs = asked.pairs or (8 if cuda else 2)
    copies = -(-routing.spec.E // RANKS) + 1
    work = RankWork(routing.spec, costs.grid.kernel, dtype, device, copies, cache_bytes(device))
    cells = emulate(routing, costs, work, effort, regimes, pairs, clock)
    show_cells(cells)
    control = measure_control(routing.spec)
    for name, times in control.items():
        say(
            f"{name.replace('_', ' ')}, host µs: "
            + ", ".join(f"{key} {1e6 * value:.1f}" for key, value in times.items())
        )
    error = [cell.expert_error_abs for cell in cells]
    if error:
        say(f"simulator's error on the slowest rank's work: {np.mean(error):.1%} mean, {max(error):.1%} worst cell")
    for warning in costs.warnings:
        say(f"# {warning}")
    return {"cells": [asdict(cell) for cell in cells], "control": control, "warnings": list(costs.warnings)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
