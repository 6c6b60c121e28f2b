"""Fidelity: the simulator, fed with a CPU profile of this machine, against the live 2-rank engine.

Run: python benchmarks/bench_fidelity.py [--requests N] [--repeats N] [--turns N] [--seed N] [--profile FILE]
Serves two workloads live, several times each, and measures the profiles that the second one needs (or takes FILE).
What the simulator says is the typical time of an undisturbed machine, so it is compared with the *median* over the
repetitions of each layer and each request; the column *noise* says how far that median itself is from where it would
settle (half of what the medians of random halves of the repetitions differ by): an error below it cannot be told from
none. All requests of a workload are there at the start, so that every repetition runs the same iterations. Prompts
come in by chunks of a token budget: first tokens then come at many moments, not at the end of one iteration.

A live layer begins when its last rank enters it. *Layer*: the recorded loads of each iteration go through the
``measured`` cost model as they are; nothing is fitted on live runs. *Requests*: the second workload is simulated whole
with the recorded routing and the live scheduler's settings; what an iteration takes beyond the profile's layers
(attention, head, Python, the step to the next iteration) is a linear function of its tokens, fitted on the first
workload: on the mean of each iteration, for it is means that add up over a request, scaled so that together they take
what the median repetition does.

A machine's speed changes from minute to minute, so there are turns: each serves the first workload, measures a profile,
and serves the second one. Repetitions are pooled over the turns (the first of each launch is left out), and what is
predicted is the median of the turns' predictions, so that a slow minute meets both sides alike. Errors are relative to
what was measured. Run it on an idle machine with two cores: on a busy one the waits of the exchange, which no profile
can know, decide. Where the system allows it, everything runs at real-time priority, so that other programs are at least
outranked.

Axes: S ranks, I iterations, L layers, N requests, B repetitions, P profiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeless.cluster import cluster
from moeless.contracts import FloatArray, IntArray, LayerPlan, Policy, Request
from moeless.costs.measured import MeasuredCosts
from moeless.costs.nonexpert import NonExpertTime
from moeless.engine.bench import LiveBench, LiveConfig
from moeless.engine.results import layer_seconds, read_records
from moeless.files import write_json
from moeless.policy import ResolvedPolicy, resolve
from moeless.profiling.run import ProfileOptions, make_plan, profile_model
from moeless.profiling.timing import Effort
from moeless.simulator import Replay, SimulationSettings
from moeless.simulator.gpu_pool import GpuPool
from moeless.simulator.serving_loop import serve_pools
from moeless.simulator.tenants import Tenant
from moeless.spec import MoESpec, preset
from moeless.workloads.lengths import Workload
from moeless.workloads.schedulers import Continuous

OUTPUT_TOKENS, AT_ONCE = 32, 1e-9
#: Requests at work at a time: others wait, so that batches are of many sizes. Tokens of an iteration at most.
MAX_RUNNING, TOKEN_BUDGET = 12, 256
#: Grid of the profile: no expert of a workload gets more tokens, no rank has more experts.
TOKENS, ACTIVE = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256), (1, 2, 3, 4, 6, 8)
#: Repetitions, in each turn, of the workload that the rest is fitted on.
CALIBRATION = 3


@dataclass(frozen=True)
class Live:
    """A workload served several times: medians, and every token's experts in order of (request, position).

    Attributes:
        expert_BIL, layer_BIL: seconds of the slowest rank's experts (processor time) and of the layer.
        iteration_BI: seconds from the start of each iteration to the start of the next.
        first_BN, last_BN: seconds of each request to its first and last token.
    """

    spec: MoESpec
    requests: tuple[Request, ...]
    expert_BIL: FloatArray
    layer_BIL: FloatArray
    iteration_BI: FloatArray
    first_BN: FloatArray
    last_BN: FloatArray
    load_ILSE: IntArray
    topk_TLK: np.ndarray
    base_N: IntArray


def pooled(parts: Sequence[Live]) -> Live:
    """All repetitions of one workload, from several launches.

    Raises:
        RuntimeError: the launches ran different iterations.
    """
    first = parts[0]
    if any(not np.array_equal(part.load_ILSE, first.load_ILSE) for part in parts):
        raise RuntimeError("launches of a workload ran different iterations")
    names = ("expert_BIL", "layer_BIL", "iteration_BI", "first_BN", "last_BN")
    together = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return dataclasses.replace(first, **together)


class KeepingBench(LiveBench):
    """A live benchmark that hands out its records."""

    live: Live

    def _cells(self, job: Any, out: Path) -> list[Any]:
        every, spec = [read_records(job, cell) for cell in range(len(job.policies))], job.spec
        parts = [dict(np.load(job.folder / f"records-{job.recorded_cell}-{rank}.npz")) for rank in range(job.ranks)]
        load = np.zeros((len(every[0].end_I), spec.L, job.ranks, spec.E), np.int64)
        for rank, part in enumerate(parts):
            at, experts = part["trace_iteration"], part["trace_experts"]
            layer = np.broadcast_to(np.arange(spec.L)[None, :, None], experts.shape)
            np.add.at(load, (np.broadcast_to(at[:, None, None], experts.shape), layer, rank, experts), 1)
        columns = {n: np.concatenate([p[f"trace_{n}"] for p in parts]) for n in ("request", "position", "experts")}
        order = np.lexsort((columns["position"], columns["request"]))
        base_N = np.searchsorted(columns["request"][order], np.arange(len(job.requests)))
        for records in every:
            if not np.array_equal(records.column("tokens").sum(0)[:, 0], load[:, 0].sum((1, 2))):
                raise RuntimeError("repetitions of a workload ran different iterations")
        # the first repetition of a launch warms caches and memory up: it is slower than all others
        every = every[1:]
        seconds = [layer_seconds(records, own_only=False) for records in every]
        finished = [sorted(records.finished, key=lambda entry: int(entry["request"])) for records in every]
        first, last = (
            np.array([[entry["token_times"][at] - entry["arrival"] for entry in one] for one in finished])
            for at in (0, -1)
        )
        steps = [np.diff(records.start_I, append=records.end_I[-1]) for records in every]
        self.live = Live(
            spec,
            # the live clock is past all arrivals when it first asks; the simulated one begins at 0
            tuple(dataclasses.replace(live.request, arrival=0.0) for live in job.requests),
            np.stack([one.expert for one in seconds]),
            np.stack([one.total for one in seconds]),
            np.array(steps),
            first,
            last,
            load,
            columns["experts"][order].astype(np.uint16),
            base_N,
        )
        return super()._cells(job, out)


def serve(count: int, repeats: int, seed: int) -> Live:
    """Serve a workload under static EP on two ranks, several times in one launch, and once more to warm up."""
    # all arrive at once: which requests an iteration holds does not depend on how fast the last one was; answers are of
    # many lengths, so that prompts come in while others decode
    config = LiveConfig(
        policies=("static",) * (repeats + 1),
        max_requests=count,
        time_scale=AT_ONCE,
        output_tokens=OUTPUT_TOKENS,
        token_budget=TOKEN_BUDGET,
        max_running=MAX_RUNNING,
        record=True,
        predict=False,
        seed=seed,
    )
    bench = KeepingBench(config)
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
    # static EP on real ranks gathers counts too; a profile of the engine's layer holds it
    gather = 0.0 if costs.exchange.engine is not None else costs.exchange.gather_seconds()
    for i, load_LSE in enumerate(live.load_ILSE):
        for at, plan in enumerate(plans):
            time = costs.layer_seconds(np.ascontiguousarray(load_LSE[at][:, plan.expert_R]), plan)
            expert[i, at], layer[i, at] = time.expert, time.total + gather
    return expert, layer


def errors(name: str, predicted: np.ndarray, measured_BX: np.ndarray) -> None:
    """One line of the table: mean absolute error against the median of the repetitions, the error of the mean, and the
    noise of that median."""
    mine, theirs = np.ravel(predicted), np.median(measured_BX, 0).ravel()
    single = float(np.mean(np.abs(mine - theirs) / theirs))
    mean = mine.mean() / theirs.mean() - 1
    figures = f"{1e3 * theirs.mean():9.3f} {1e3 * mine.mean():9.3f} {100 * single:8.1f} {100 * mean:+8.1f}"
    print(f"{name:<48} {figures} {100 * noise(measured_BX):8.1f}")


def noise(measured_BX: np.ndarray, splits: int = 50) -> float:
    """Mean relative error of the median of all repetitions, told from random halves of them.

    A half's median is off by about the square root of 2 times as much as the whole's, and two halves differ by that
    times the square root of 2 again.
    """
    count, random = len(measured_BX), np.random.default_rng(0)
    if count < 4:
        return float("nan")
    middle, differ = np.median(measured_BX, 0), []
    for _ in range(splits):
        order = random.permutation(count)
        one, other = (np.median(measured_BX[part], 0) for part in (order[: count // 2], order[count // 2 :]))
        differ.append(np.mean(np.abs(one - other) / middle))
    return float(np.mean(differ)) / 2.0


def simulated(live: Live, costs: MeasuredCosts, runtime: ResolvedPolicy, rest: Rest) -> tuple[np.ndarray, np.ndarray]:
    """Each request's seconds to its first and last token, ``[N]``, in a simulation of the whole workload."""
    replay = Replay(live.topk_TLK, Workload(live.requests, False, (), live.base_N), live.spec.E, costs.cluster.G)
    scheduler = Continuous(live.requests, costs.cluster.G, token_budget=TOKEN_BUDGET, max_running=MAX_RUNNING)
    run = Tenant(replay, live.requests, scheduler, runtime, SimulationSettings(), None, None, None)
    run.nonexpert = rest  # type: ignore[assignment]
    # steady decode steps are timed by the shapes' numbers, which the rest has none of: each step by itself instead
    scheduler.steady = lambda: (1, math.inf)  # type: ignore[method-assign]
    serve_pools(GpuPool([run]))
    times = run.clocks.times()
    return times.ttft_N, times.e2el_N


def predictions(live: Live, calibration: Live, profile: Path) -> dict[str, np.ndarray]:
    """All that one profile says of the second workload: expert and layer ``[I, L]``, first and last ``[N]``."""
    where = cluster("cpu2")
    costs = MeasuredCosts(live.spec, where, str(profile))
    if costs.exchange.engine is None:
        print("! the profile holds no layer of the engine: remake it with `moeless profile --ranks 2`")
    runtime = resolve(Policy("static"), spec=live.spec, cluster=where, costs=costs, extra_slots=0, predictors={})
    plans = runtime.first_plans([None] * live.spec.L)
    expert, layer = predict(live, costs, plans)
    typical_I = calibration.iteration_BI.mean(0)
    typical_I *= np.median(calibration.iteration_BI.sum(1)) / typical_I.sum()
    beyond = typical_I - predict(calibration, costs, plans)[1].sum(1)
    first, last = simulated(live, costs, runtime, Rest(tokens_I(calibration), beyond))
    for warning in costs.warnings:
        print(f"! {warning}")
    return {"expert": expert, "layer": layer, "first": first, "last": last}


def compare(live: Live, calibration: Live, profiles: Sequence[Path]) -> None:
    """Print the table."""
    every_P = [predictions(live, calibration, profile) for profile in profiles]
    expert, layer, first, last = (
        np.median([each[name] for each in every_P], 0) for name in ("expert", "layer", "first", "last")
    )
    print(f"{'':<48} {'live ms':>9} {'sim ms':>9} {'MAE %':>8} {'mean %':>8} {'noise %':>8}")
    errors("experts of the slowest rank (processor time)", expert, live.expert_BIL)
    errors("MoE layer", layer, live.layer_BIL)
    errors("MoE layers of an iteration", layer.sum(1), live.layer_BIL.sum(2))
    total_I = live.load_ILSE[:, 0].sum((1, 2)) // live.spec.K
    for few, many in ((1, 9), (9, 33), (33, 129), (129, 1 << 20)):
        at = (total_I >= few) & (total_I < many)
        if at.any():
            upto = f"{few} to {min(many - 1, total_I.max())} tokens"
            errors(f"MoE layer, {at.sum()} iterations of {upto}", layer[at], live.layer_BIL[:, at])
    errors("(one repetition for a prediction: layer)", live.layer_BIL[0], live.layer_BIL[1:])
    errors("(the same, layers of an iteration)", live.layer_BIL[0].sum(1), live.layer_BIL[1:].sum(2))
    errors("request, time to first token, rest calibrated", first, live.first_BN)
    errors("request, end to end, rest calibrated", last, live.last_BN)


def write_profile(path: Path) -> None:
    """Measure what the comparison needs of this machine: a grid as large as the workload's loads, few copies."""
    spec, options = preset("bundled"), ProfileOptions(ranks=2, force=True)
    plan = make_plan(spec, "cpu", options)
    # static EP copies nothing; the turns go through the grid more than once
    plan = dataclasses.replace(
        plan, tokens=TOKENS, active=ACTIVE, copies=plan.copies[:1], effort=Effort(0.05, 7, 40), passes=1
    )
    write_json(path, profile_model(spec, plan, options, path.parent))


def outrank() -> str:
    """Take real-time priority where the system allows it, for this process and those that it starts; says which."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(5))
    except (AttributeError, OSError):
        return "normal priority"
    return "real-time priority"


def main() -> None:
    """Profile, calibrate, predict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20, help="repetitions of the second workload over all turns")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", type=Path, default=None)
    parser.add_argument("--normal", action="store_true", help="stay at normal priority")
    parser.add_argument("--write-profile", type=Path, default=None, help="measure one profile alone, and stop")
    arguments = parser.parse_args()
    if arguments.write_profile is not None:
        write_profile(arguments.write_profile)
        return
    priority = "normal priority" if arguments.normal else outrank()
    before, begun = os.getloadavg()[0], time.perf_counter()
    ran: tuple[list[Live], list[Live]] = ([], [])
    profiles = [arguments.profile] if arguments.profile else []
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(arguments.turns):
            ran[0].append(serve(arguments.requests, CALIBRATION, arguments.seed))
            if arguments.profile is None:
                profiles.append(Path(scratch) / f"cpu-{turn}.json")
                # a process of its own: it forks ranks, and so do the turns that follow
                subprocess.run([sys.executable, __file__, "--write-profile", str(profiles[-1])], check=True)
            ran[1].append(serve(arguments.requests, -(-arguments.repeats // arguments.turns), arguments.seed + 1))
        calibration, live = (pooled(parts) for parts in ran)
        print(
            f"bundled model, 2 ranks, static EP: {live.layer_BIL.shape[1]} iterations, {len(live.requests)} requests, "
            f"{len(live.layer_BIL)} repetitions, seeds {arguments.seed} and {arguments.seed + 1}, {priority}"
        )
        levels = " ".join(f"{1e3 * part.layer_BIL.mean():.2f}" for part in ran[1])
        print(
            f"load average {before:.2f} before, {os.getloadavg()[0]:.2f} after, on {os.cpu_count()} cores; "
            f"{time.perf_counter() - begun:.0f} s; mean layer of the turns {levels} ms"
        )
        compare(live, calibration, profiles)


if __name__ == "__main__":
    main()
