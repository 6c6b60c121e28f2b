"""Speed of the simulator: layer events per second by policy, and how it grows with GPUs, experts and requests.

Run: python benchmarks/bench_simulator.py [--hour | --growth | --keep]
``--growth``: the curve to 1,024 GPUs, by experts and by requests, with memory. ``--hour``: the Azure conversation hour
on gpt-oss-20b's routing, where ../shared/data or MOELESS_SHARED_DATA has them. ``--keep``: what it costs that elastic
leaves plans alone whose forecast hardly changed, under load enough for copies. Everything but ``--hour`` runs on
made-up routing.
A layer event is one MoE layer of one iteration; per second by the clock. Steady decode steps, layers that
dispatch and the elastic planners' plans are spread over cores.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moeless import __version__
from moeless.cluster import Cluster, cluster
from moeless.contracts import Forecast, Phase, Policy, Request
from moeless.costs import COSTS
from moeless.costs.roofline import RooflineCosts
from moeless.experiments.cells.scale import some_layers
from moeless.policy import resolve
from moeless.predictors import PREDICTORS
from moeless.simulator import Replay, SimulationSettings, simulate, tally
from moeless.simulator.bench import Bench, BenchConfig
from moeless.spec import MoESpec, preset
from moeless.traces.synthetic import SyntheticParams, write_synthetic
from moeless.workloads.lengths import Workload
from moeless.workloads.schedulers import Continuous

#: Policies, and iterations between the plans of those that plan per iteration.
POLICIES = (("static", 1), ("eplb:history", 1), ("oracle", 1), ("elastic:history:1", 256), ("moeless:history:1", 256))
EVERY_ITERATION = (("elastic:history:1", 1), ("moeless:history:1", 1))


def skewed_topk(spec: MoESpec, tokens: int, seed: int = 0) -> np.ndarray:
    """Top-k ids whose popularity falls as 1 / rank, in another order in every layer."""
    random = np.random.default_rng(seed)
    topk = np.empty((tokens, spec.L, spec.K), np.uint16)
    weight = -np.log(np.arange(1, spec.E + 1))
    for layer in range(spec.L):
        keys = weight[random.permutation(spec.E)] + random.gumbel(size=(tokens, spec.E))
        topk[:, layer] = np.argpartition(-keys, spec.K - 1, axis=1)[:, : spec.K]
    return topk


class Measured(NamedTuple):
    """One run's layer events per second, how many there were, extras in force per layer, and cores at work."""

    rate: float
    events: int
    extras: float
    cores: float


def measure(
    spec: MoESpec,
    where: Cluster,
    policy: str,
    plan_every: int,
    count: int,
    output: int,
    rate: float,
    *,
    at_once: int = 256,
    control: bool = True,
) -> Measured:
    """One run, after one that compiles.

    Args:
        rate: requests per second; ``at_once`` of them run at most.
        control: False: gathering counts and deciding take no time, so that copies pay in small batches too.
    """
    topk_TLK = skewed_topk(spec, 4096)
    random = np.random.default_rng(1)
    arrivals = np.cumsum(random.exponential(1.0 / rate, count))
    requests = tuple(Request(i, float(t), 64, output, trace_request=0) for i, t in enumerate(arrivals))
    base = random.integers(0, len(topk_TLK) - 64 - output, count)
    replay = Replay(topk_TLK, Workload(requests, False, (), base), spec.E, where.G)
    runtime = resolve(
        Policy.parse(policy),
        spec=spec,
        cluster=where,
        costs=RooflineCosts(spec, where, charge_control=control),
        extra_slots=1,
        predictors={"history": PREDICTORS.get("history")(spec)},
    )
    settings = SimulationSettings(plan_every=plan_every)

    def once(chosen: tuple[Request, ...]) -> Measured:
        start, busy = time.perf_counter(), time.process_time()
        scheduler = Continuous(chosen, where.G, max_running=at_once)
        record = simulate(replay, chosen, scheduler, runtime, settings=settings).record
        seconds, events = time.perf_counter() - start, record.iterations * spec.L
        extras = record.tally[tally.REPLICAS] / events - spec.E
        return Measured(events / seconds, events, extras, (time.process_time() - busy) / seconds)

    once(requests[:2])
    return once(requests)


def show(name: str, rate: float, events: int, extras: float | None = None, cores: float = 1.0) -> None:
    """One line of the table."""
    held = "" if extras is None else f", {extras:.1f} extras a layer, {cores:.1f} cores"
    print(f"{name:<52} {rate / 1e3:>10,.1f} k layer events/s   ({events:,} events{held})", flush=True)


def hour(folder: Path) -> None:
    """The Azure conversation hour (19,366 requests, continuous batching), gpt-oss-20b on h100x8."""
    from moeless.traces.importers.npz import import_npz

    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch) / "trace"
        import_npz(folder / "routing" / "gpt-oss-20b.npz", trace, preset("gpt-oss-20b"))
        for policy, plan_every in (POLICIES[0], POLICIES[3]):
            config = BenchConfig(
                trace=trace,
                policies=(Policy.parse(policy),),
                costs=("roofline",),
                arrivals=str(folder / "arrivals" / "azure-2023-conv.csv"),
                max_requests=None,
                plan_every=plan_every,
            )
            bench = Bench(config)
            start = time.process_time()
            done = bench.run_cell("roofline", Policy.parse(policy))
            seconds = time.process_time() - start
            events = done.record.iterations * bench.spec.L
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"{policy}: {len(bench.workload.requests):,} requests in {seconds:.1f} s of CPU, peak {peak:.2f} GiB")
            show(f"  Azure hour, {policy}", events / seconds, events)


def keep() -> None:
    """Elastic's ``keep`` from 0 (every changed forecast is planned for), gpt-oss-20b's shapes, h100x8."""
    print("gpt-oss-20b shapes, synthetic routing, h100x8, roofline costs, elastic:history:1 planning every iteration")
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch) / "trace"
        params = SyntheticParams(prompt_tokens=200, output_tokens=40)
        write_synthetic(trace, preset("gpt-oss-20b"), requests=128, params=params)
        for batching, rate, count in (("continuous", 500.0, 600), ("one-second", 300.0, 600)):
            for tolerance in (0.0, 0.01, 0.05, 0.2):
                config = BenchConfig(
                    trace=trace,
                    policies=(Policy.parse("elastic:history:1"),),
                    costs=("roofline",),
                    arrivals=f"poisson:{rate:g}",
                    batching=batching,
                    max_requests=count,
                    planner_params={"elastic": {"keep": tolerance}},
                )
                start = time.process_time()
                layer = Bench(config).run_cell("roofline", config.policies[0]).cell.layer
                seconds = time.process_time() - start
                print(
                    f"{batching} at {rate:g}/s, keep {tolerance:<5g} {1e3 * layer.mean_ms:9.2f} us a layer, "
                    f"{layer.moved_bytes / 1e9:8.2f} GB moved, {layer.replicas:6.2f} copies, {seconds:5.1f} s of CPU",
                    flush=True,
                )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hour", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    print(f"moeless {__version__}, Python {platform.python_version()}, NumPy {np.__version__}, {platform.processor()}")
    print(f"{os.cpu_count()} cores; command: {' '.join(sys.argv)}\n")
    if arguments.hour:
        hour(Path(os.environ.get("MOELESS_SHARED_DATA", "../shared/data")))
        return
    if arguments.keep:
        keep()
    elif arguments.growth:
        growth()
    else:
        speed()


def speed() -> None:
    """Layer events per second by policy."""
    spec, eight = preset("gpt-oss-20b"), cluster("h100x8")
    print("gpt-oss-20b shapes, h100x8, made-up routing, 5.4 requests/s")
    for policy, plan_every in POLICIES:
        name = f"{policy}, plans every {plan_every}" if plan_every > 1 else policy
        show(name, *measure(spec, eight, policy, plan_every, 40, 300, 5.4))
    for policy, plan_every in EVERY_ITERATION:
        show(f"{policy}, plans every iteration", *measure(spec, eight, policy, plan_every, 20, 300, 5.4))
    print("\nthe same at 500 requests/s: hundreds of running requests, prefill and decode in one iteration")
    for policy, count in (("static", 1000), ("elastic:history:1", 1000), ("moeless:history:1", 1000)):
        show(f"{policy}, plans every iteration", *measure(spec, eight, policy, 1, count, 40, 500.0))
    print("\nand with control that takes no time, so that elastic holds copies and dispatches in nearly all layers")
    for every, count, output, rate in ((1, 20, 300, 5.4), (1, 1000, 40, 500.0), (256, 1000, 40, 500.0)):
        name = f"elastic:history:1, {rate:g} requests/s, plans every {every}"
        show(name, *measure(spec, eight, "elastic:history:1", every, count, output, rate, control=False))
    print("\nand elastic-ahead, control charged: shares fixed ahead, extras that gather no counts")
    for every, count, output, rate in ((1, 4, 100, 5.4), (1, 40, 40, 500.0), (256, 1000, 40, 500.0)):
        name = f"elastic-ahead:history:1, {rate:g} requests/s, plans every {every}"
        show(name, *measure(spec, eight, "elastic-ahead:history:1", every, count, output, rate))


def growth() -> None:
    """How speed and memory change with GPUs, experts and requests."""
    spec, eight = preset("gpt-oss-20b"), cluster("h100x8")
    deep = some_layers("deepseek-v3", 8)
    print("deepseek-v3 shapes, 8 layers, 4 requests a GPU at once, by GPUs (nodes of eight)")
    for policy, every in (
        ("static", 1),
        ("elastic:history:1", 1),
        ("elastic:history:1", 256),
        ("moeless:history:1", 1),
    ):
        for nodes in (1, 4, 16, 64, 128):
            where = cluster("h100x8" if nodes == 1 else f"h100x8x{nodes}")
            name = f"  {policy}, {where.G} GPUs" + (f", plans every {every}" if every > 1 else "")
            at_once = 4 * where.G
            show(name, *measure(deep, where, policy, every, at_once, 128, 1e4 * where.G, at_once=at_once))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"{'':<52} peak memory so far {peak:.2f} GiB")
    print("\nstatic, by experts, h100x8x4")
    for name in ("mixtral-8x7b", "phi-3.5-moe", "gpt-oss-20b", "qwen3-30b-a3b", "deepseek-v3"):
        # the large ones do not fit beside each other on eight GPUs in any but their stored precision
        made = preset(name)
        show(
            f"  {name}: {made.E} experts, top-{made.K}", *measure(made, cluster("h100x8x4"), "static", 1, 30, 200, 5.4)
        )
    print("\nstatic, by requests, gpt-oss-20b shapes, h100x8")
    for count in (50, 500, 2000):
        show(f"  {count} requests", *measure(spec, eight, "static", 1, count, 200, 5.4))
    planning(deep)


def planning(spec: MoESpec) -> None:
    """Seconds of planning and of dispatching one layer by GPUs, 64 tokens a GPU, popularity 1 / rank."""
    print(f"\nelastic, one layer planned and dispatched, {spec.E} experts, by GPUs")
    share_E = 1.0 / np.arange(1, spec.E + 1)
    for nodes in (1, 4, 16, 64, 128):
        where = cluster("h100x8" if nodes == 1 else f"h100x8x{nodes}")
        runtime = resolve(
            Policy.parse("elastic:history:1"),
            spec=spec,
            cluster=where,
            costs=COSTS.get("roofline")(spec, where),
            extra_slots=1,
            predictors={"history": PREDICTORS.get("history")(spec)},
        )
        mean_E = share_E / share_E.sum() * 64 * where.G * spec.K
        forecast = Forecast(mean_E, mean_E.copy(), 64 * where.G, "made up")
        load_SE = np.random.default_rng(0).poisson(np.tile(mean_E / where.G, (where.G, 1)))
        # compiled before the clock starts
        plan = runtime.plan(0, Phase.MIXED, forecast, None)
        runtime.dispatch(load_SE, plan, np.ones(plan.R, np.bool_))
        start = time.process_time()
        plan = runtime.plan(0, Phase.MIXED, forecast, None)
        planned = time.process_time()
        runtime.dispatch(load_SE, plan, np.ones(plan.R, np.bool_))
        took = time.process_time() - planned
        print(
            f"  {where.G:>5} GPUs {1e3 * (planned - start):9.2f} ms planning, {1e3 * took:9.2f} ms dispatching", end=""
        )
        print(f", {plan.num_extra} extras", flush=True)


if __name__ == "__main__":
    main()
