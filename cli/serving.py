"""What ``moeless serve-bench`` asks of the simulator, or of the live engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moeless.cli import common
from moeless.engine.options import LiveConfig
from moeless.errors import UserError
from moeless.policy.options import Policies
from moeless.simulator.options import BenchConfig

if TYPE_CHECKING:
    from moeless.metrics import Cell
    from moeless.tracking.run import Run


@dataclass(frozen=True)
class Asked:
    """A checked request; nothing has run.

    Attributes:
        name: what it runs on.
        resolved: the configuration, for the manifest.
        inputs: files and folders that are read.
        estimate: what it will take.
        serve: makes the cells, in a run's folder.
        label: of a cell, before its warnings.
        check: fails a run whose cells are wrong; by default all are right.
    """

    name: str
    resolved: dict[str, Any]
    inputs: list[Path]
    estimate: dict[str, Any]
    serve: Callable[[Run], Iterator[Cell]]
    label: str
    check: Callable[[list[Cell]], object] = len


def simulated(given: Mapping[str, Any], quick: bool) -> Asked:
    """A benchmark on the simulator.

    Raises:
        UserError: an input is missing or wrong.
    """
    from moeless.contracts import Policy
    from moeless.simulator.bench import Bench
    from moeless.simulator.sweep import check_points, points, run_sweep
    from moeless.simulator.timeline import Timeline
    from moeless.tuning.presets import load_preset, run_presets

    if given["trace"] is None:
        raise UserError("serve-bench needs --trace DIR, a routing trace made by `moeless trace` or import-trace")
    bounded = given["duration"] is not None or given["arrivals_window"] is not None
    limit = given["max_requests"] or (None if bounded else BenchConfig.max_requests)
    axes = {"cluster": given["cluster"] or [BenchConfig.cluster], "request_rate": given["request_rate"] or [None]}
    config = BenchConfig.given(
        given,
        policies=tuple(Policy.parse(text) for text in given["policies"] or Policies.policies),
        max_requests=min(limit or 100, 100) if quick else limit,
        **{name: values[0] for name, values in axes.items()},
    )
    window = Timeline.parse(given["timeline"]) if given["timeline"] else None
    presets = [load_preset(path) for path in given["preset"] or ()]
    planned = points(config, axes)
    bench = Bench(config)
    check_points(planned, bench)

    def serve(run: Run) -> Iterator[Cell]:
        done, total = 0, len(bench.workload.requests)
        with common.progress() as bar:
            task = bar.add_task("", total=total * (len(planned) + len(presets) * len(config.costs)))

            def tick(name: str, completed: int) -> None:
                bar.update(task, completed=done * total + completed, description=name)

            for _, cell in run_sweep(planned, given["resume"], tick):
                yield cell
                done += 1
            for simulation in run_presets(bench, presets, tick):
                yield simulation.cell
                done += 1
        if window is not None:
            bench.run_cell(config.costs[0], config.policies[0], timeline=window)
            if not window.write(run.path / "timeline.json"):
                empty = f"nothing happened in the timeline's window {given['timeline']}"
                run.warn(empty)
                common.remarks.print(f"! {empty}")
            run.produced(run.path / "timeline.json", "timeline")

    resolved = dataclasses.asdict(config) | {"policies": [str(policy) for policy in config.policies]}
    resolved |= {"cluster": axes["cluster"], "request_rate": given["request_rate"]}
    inputs = [config.trace, *config.predictors, *(given["preset"] or ())]
    inputs += [path for path in (Path(config.arrivals),) if path.is_file()]
    estimate = bench.estimate() | {"cells": len(planned)}
    return Asked(bench.spec.name, resolved, inputs, estimate, serve, "{0.policy} under {0.costs}")


def live(given: Mapping[str, Any], quick: bool, out: Path | None, dry_run: bool) -> Asked:
    """A benchmark on this machine's ranks; under torchrun, a process that is not the first rank serves and ends here.

    Raises:
        UserError, RunFailed: as the engine does.
    """
    if max(len(given["cluster"] or []), len(given["request_rate"] or [])) > 1:
        raise UserError("a live run has one cluster and one request rate; sweeps belong to --backend sim")
    if len(given["costs"] or []) > 1:
        raise UserError("a live run plans by one cost model; give --costs once")
    limit = given["max_requests"] or LiveConfig.max_requests
    config = LiveConfig.given(
        given,
        model=None if given["model"] == "bundled" else given["model"],
        max_requests=min(limit, 8) if quick else limit,
        **{name: (given[name] or [None])[0] for name in ("cluster", "request_rate", "costs")},
    )
    from moeless.engine.bench import LiveBench, check_verified

    bench = LiveBench(config)
    if bench.place is not None and out is None:
        raise UserError("under torchrun a live run needs --out, a folder that all its machines see")
    first_here = bench.place is None or bench.place.local_rank == 0
    for remark in bench.remarks if first_here else ():
        common.remarks.print(f"! {remark}", highlight=False)
    if bench.place is not None and out is not None and bench.place.rank > 0 and not dry_run:
        bench.serve_rank(out)
        raise typer.Exit(0)

    def serve(run: Run) -> Iterator[Cell]:
        common.remarks.print(f"{config.ranks} {bench.device} ranks, {config.host} host, {len(bench.requests)} requests")
        for remark in bench.remarks:
            run.warn(remark)
        yield from bench.run(run.path)

    inputs = [bench.model / name for name in ("config.json", "model.safetensors") if (bench.model / name).is_file()]
    inputs += config.predictors
    name, estimate = f"live-{bench.spec.name}", bench.estimate()
    return Asked(name, config.to_json(), inputs, estimate, serve, "{0.policy} ({0.evidence})", check_verified)
