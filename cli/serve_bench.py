"""``moeless serve-bench``: a workload under several policies, their latency and their bills."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moeless.cli import common
from moeless.configuration import check_backend
from moeless.engine.options import LiveConfig
from moeless.errors import UserError
from moeless.policy.options import Policies
from moeless.simulator.options import BenchConfig, SimulatedRun

if TYPE_CHECKING:
    from moeless.metrics import Cell
    from moeless.tracking.run import Run

BACKENDS = {"sim": SimulatedRun, "live": LiveConfig}


def run(
    given: Mapping[str, Any],
    backend: Annotated[
        Literal["sim", "live"],
        typer.Option(
            "--backend", help="On the simulator, or live on ranks of this machine.", rich_help_panel="Backend"
        ),
    ] = "sim",
    quick: common.QuickOption = False,
    out: common.RunFolderOption = None,
    wandb: common.WandbOption = None,
    as_json: common.JsonOption = False,
    dry_run: common.DryRunOption = False,
    config: common.ConfigOption = None,
) -> None:
    """Serve a workload under each policy and cost model; compare latency, balance and three bills.

    Example: moeless serve-bench --backend sim --trace traces/gpt-oss --policy static --policy eplb:history

    Live: moeless serve-bench --backend live --ranks 8 --host megatron --policy static --policy moeless --verify
    """
    from moeless.cli.serve_live import prediction_table, serve_live, verification_table
    from moeless.cli.tables import show_cells
    from moeless.metrics import Result

    check_backend(BACKENDS, backend, given)
    serve = _simulate if backend == "sim" else serve_live
    cells, record = serve(given, quick, out, wandb, dry_run)
    if as_json:
        common.print_json(Result(str(record.manifest["command_line"]), tuple(cells)).to_json())
        return
    show_cells(cells)
    verification_table(cells)
    prediction_table(cells)
    common.remarks.print(f"run folder: {record.path}")


command = common.command(run, BACKENDS, several=("cluster", "request_rate"))


def _simulate(
    given: Mapping[str, Any], quick: bool, out: Path | None, wandb: bool | None, dry_run: bool
) -> tuple[list[Cell], Run]:
    """Run what is asked for on the simulator; the cells and their run."""
    from moeless.contracts import Policy
    from moeless.metrics import Result
    from moeless.metrics.catalogue import logged
    from moeless.simulator.bench import Bench
    from moeless.simulator.sweep import check_points, points, run_sweep
    from moeless.simulator.timeline import Timeline
    from moeless.tracking.run import start_run
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
    resolved = dataclasses.asdict(config) | axes | {"policies": [str(policy) for policy in config.policies]}
    resolved["request_rate"] = given["request_rate"]
    if dry_run:
        common.dry_run(resolved, bench.estimate() | {"cells": len(planned)})
    inputs = [config.trace, *config.predictors, *(given["preset"] or ())]
    inputs += [path for path in (Path(config.arrivals),) if path.is_file()]
    cells: list[Cell] = []
    with start_run("serve-bench", bench.spec.name, resolved, config.seed, inputs, out, wandb) as record:
        with common.progress() as bar:
            total = len(bench.workload.requests)
            task = bar.add_task("", total=total * (len(planned) + len(presets) * len(config.costs)))

            def tick(name: str, completed: int) -> None:
                bar.update(task, completed=len(cells) * total + completed, description=name)

            def keep(cell: Cell) -> None:
                cells.append(cell)
                record.log(logged(cell))
                for warning in cell.warnings:
                    record.warn(f"{cell.policy} under {cell.costs}: {warning}")

            for _, cell in run_sweep(planned, given["resume"], tick):
                keep(cell)
            for simulation in run_presets(bench, presets, tick):
                keep(simulation.cell)
            if window is not None:
                bench.run_cell(config.costs[0], config.policies[0], timeline=window)
                if not window.write(record.path / "timeline.json"):
                    empty = f"nothing happened in the timeline's window {given['timeline']}"
                    record.warn(empty)
                    common.remarks.print(f"! {empty}")
                record.produced(record.path / "timeline.json", "timeline")
        record.write_result(Result(str(record.manifest["command_line"]), tuple(cells)))
    return cells, record
