"""Fidelity: the simulator, fed with a CPU profile of this machine, against the live 2-rank engine.

Run: python benchmarks/bench_fidelity.py [--requests N] [--profile FILE]
Three steps, about two minutes: profile the bundled model's parts (or take FILE), serve a workload live for
calibration, serve another one live and predict it. *Layer*: the recorded loads of each iteration go through the
``measured`` cost model, as they are, and with what the calibration run took beyond it (the engine's Python and small
operations), a linear function of the layer's tokens. *Requests*: the whole workload is simulated with the recorded
routing and the live scheduler's settings; what an iteration takes beyond the profile's layer times (attention, head,
Python) is a linear function of its tokens, fitted on the calibration run. Errors are relative to what was measured. Run
it on an idle machine with two cores: on a busy one the waits of the exchange, which no profile can know, decide.

Axes: S ranks, I iterations, L layers, N requests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeless.cluster import cluster
from moeless.contracts import IntArray, LayerPlan, Policy, Request
from moeless.costs.measured import MeasuredCosts
from moeless.costs.nonexpert import NonExpertTime
from moeless.engine.bench import LiveBench, LiveConfig
from moeless.engine.results import CellRecords, read_records
from moeless.engine.workload import WorkloadSettings
from moeless.simulator import Replay, SimulationSettings, resolve
from moeless.simulator.loop import Run
from moeless.spec import MoESpec
from moeless.workloads.lengths import Workload
from moeless.workloads.schedulers import Continuous


@dataclass(frozen=True)
class Live:
    """A live run: its requests, records, and every token's experts in order of (request, position)."""

    spec: MoESpec
    requests: tuple[Request, ...]
    records: CellRecords
    load_ILSE: IntArray
    topk_TLK: np.ndarray
    base_N: IntArray


class KeepingBench(LiveBench):
    """A live benchmark that hands out its records."""

    live: Live

    def _cells(self, job: Any, out: Path) -> list[Any]:
        records, spec = read_records(job, 0), job.spec
        parts = [dict(np.load(job.folder / f"records-0-{rank}.npz")) for rank in range(job.ranks)]
        load = np.zeros((len(records.end_I), spec.L, job.ranks, spec.E), np.int64)
        for rank, part in enumerate(parts):
            at, experts = part["trace_iteration"], part["trace_experts"]
            layer = np.broadcast_to(np.arange(spec.L)[None, :, None], experts.shape)
            np.add.at(load, (np.broadcast_to(at[:, None, None], experts.shape), layer, rank, experts), 1)
        columns = {n: np.concatenate([p[f"trace_{n}"] for p in parts]) for n in ("request", "position", "experts")}
        order = np.lexsort((columns["position"], columns["request"]))
        base_N = np.searchsorted(columns["request"][order], np.arange(len(job.requests)))
        requests = tuple(live.request for live in job.requests)
        self.live = Live(spec, requests, records, load, columns["experts"][order].astype(np.uint16), base_N)
        return super()._cells(job, out)


def serve(count: int, rate: float, seed: int) -> Live:
    """Serve a workload under static EP on two ranks."""
    workload = WorkloadSettings(
        requests=count, arrivals=f"poisson:{rate}", prompt_tokens=256, output_tokens=32, seed=seed
    )
    bench = KeepingBench(LiveConfig(("static",), workload, ranks=2, record=True))
    with tempfile.TemporaryDirectory() as scratch:
        bench.run(Path(scratch) / "run")
    return bench.live


class Rest:
    """What a run takes beyond a prediction: a fixed time and a time per token of the fullest rank, robustly fitted."""

    def __init__(self, tokens: np.ndarray, beyond: np.ndarray) -> None:
        columns = np.stack([np.ones_like(tokens), tokens], 1)
        weight = np.ones_like(beyond)
        # least absolute deviations: a preempted iteration must not move the line
        for _ in range(50):
            root = np.sqrt(weight)[:, None]
            fit, *_ = np.linalg.lstsq(columns * root, beyond * root[:, 0], rcond=None)
            weight = 1.0 / np.maximum(np.abs(columns @ fit - beyond), 1e-6)
        self.fixed, self.per_token = float(fit[0]), float(fit[1])

    def at(self, tokens: np.ndarray) -> np.ndarray:
        """Seconds for so many tokens."""
        return np.maximum(0.0, self.fixed + self.per_token * tokens)

    def seconds(self, sums_SX: np.ndarray) -> NonExpertTime:
        """As ``NonExpertCosts.seconds``; all of it once per iteration."""
        return NonExpertTime(0.0, float(self.at(sums_SX[:, 0].max(keepdims=True))[0]))


def tokens_I(live: Live) -> np.ndarray:
    """Tokens of the fullest rank in each iteration."""
    return np.asarray(live.load_ILSE[:, 0].sum(2).max(1) / live.spec.K)


def predict(live: Live, costs: MeasuredCosts, plans: Sequence[LayerPlan]) -> tuple[np.ndarray, np.ndarray]:
    """Expert and whole layer seconds of the recorded loads, ``[I, L]``."""
    expert, layer = np.zeros(live.load_ILSE.shape[:2]), np.zeros(live.load_ILSE.shape[:2])
    for i, load_LSE in enumerate(live.load_ILSE):
        for at, plan in enumerate(plans):
            time = costs.layer_seconds(np.ascontiguousarray(load_LSE[at][:, plan.expert_R]), plan)
            # static EP on real ranks gathers counts too
            expert[i, at], layer[i, at] = time.expert, time.total + costs.exchange.gather_seconds()
    return expert, layer


def errors(name: str, predicted: Sequence[float] | np.ndarray, measured: Sequence[float] | np.ndarray) -> None:
    """One line of the table: mean absolute error over single events, and the error of their mean."""
    mine, theirs = np.asarray(predicted, float).ravel(), np.asarray(measured, float).ravel()
    single = float(np.mean(np.abs(mine - theirs) / theirs))
    mean = mine.mean() / theirs.mean() - 1
    print(f"{name:<52} {1e3 * theirs.mean():9.3f} {1e3 * mine.mean():9.3f} {100 * single:8.1f} {100 * mean:+8.1f}")


def compare(live: Live, calibration: Live, profile: Path) -> None:
    """Print the table."""
    where = cluster("cpu2")
    costs = MeasuredCosts(live.spec, where, str(profile))
    runtime = resolve(Policy("static"), spec=live.spec, cluster=where, costs=costs, extra_slots=0, predictors={})
    plans = runtime.deployment([None] * live.spec.L)
    expert, layer = predict(live, costs, plans)
    before = predict(calibration, costs, plans)[1]
    wall, wall_before = (one.records.column("total").max(0) for one in (live, calibration))
    beyond = Rest(np.repeat(tokens_I(calibration), live.spec.L), (wall_before - before).ravel())
    more = layer + beyond.at(tokens_I(live))[:, None]
    print(f"{'':<52} {'live ms':>9} {'sim ms':>9} {'MAE %':>8} {'mean %':>8}")
    errors("experts of the slowest rank (processor time)", expert, live.records.column("compute").max(0))
    errors("MoE layer, profile alone", layer, wall)
    errors("MoE layer, calibrated", more, wall)
    errors("MoE layers of an iteration, calibrated", more.sum(1), wall.sum(1))
    # how well one live run tells another: the median of the calibration's layers for everything
    errors("(the calibration run's median layer)", np.full_like(wall, np.median(wall_before)), wall)
    spent = calibration.records.end_I - calibration.records.start_I
    rest = Rest(tokens_I(calibration), spent - before.sum(1))
    run = Run(
        Replay(live.topk_TLK, Workload(live.requests, False, (), live.base_N), live.spec.E, where.G),
        live.requests,
        Continuous(live.requests, where.G, token_budget=2048, max_running=64),
        runtime,
        SimulationSettings(),
        None,
        None,
        None,
    )
    run.nonexpert = rest  # type: ignore[assignment]
    run.to_the_end()
    times = run.clocks.times()
    finished = sorted(live.records.finished, key=lambda entry: int(entry["request"]))
    first = np.array([entry["token_times"][0] - entry["arrival"] for entry in finished])
    last = np.array([entry["token_times"][-1] - entry["arrival"] for entry in finished])
    errors("request, time to first token, calibrated", times.ttft_N, first)
    errors("request, end to end, calibrated", times.e2el_N, last)
    for warning in costs.warnings:
        print(f"! {warning}")


def main() -> None:
    """Profile, calibrate, predict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--rate", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", type=Path, default=None)
    arguments = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        # live runs first: they fork, which a process that has started threads must not
        calibration = serve(arguments.requests, arguments.rate, arguments.seed)
        live = serve(arguments.requests, arguments.rate, arguments.seed + 1)
        profile = arguments.profile or Path(scratch) / "cpu.json"
        if arguments.profile is None:
            command = [sys.executable, "-m", "moeless", "profile", "--model", "bundled", "--device", "cpu"]
            subprocess.run(
                [*command, "--ranks", "2", "--force", "--out", str(profile)],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        print(f"bundled model, 2 ranks, {len(live.records.end_I)} iterations, {len(live.requests)} requests, static EP")
        print(f"load average {before:.2f} before, {os.getloadavg()[0]:.2f} after, on {os.cpu_count()} cores")
        compare(live, calibration, profile)


if __name__ == "__main__":
    main()
