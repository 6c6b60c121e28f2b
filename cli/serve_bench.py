"""``moeless serve-bench``: a workload under several policies, their latency and their bills."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from moeless.cli import common
from moeless.configuration import check_backend
from moeless.engine.options import LiveConfig
from moeless.simulator.options import SimulatedRun

BACKENDS = {"sim": SimulatedRun, "live": LiveConfig}


@common.command(BACKENDS, several=("cluster", "request_rate"))
def command(
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
    dry_run: common.DryRunOption = False,
) -> common.Report:
    """Serve a workload under each policy and cost model; compare latency, balance and three bills.

    Example: moeless serve-bench --backend sim --trace traces/gpt-oss --policy static --policy eplb:history

    Live: moeless serve-bench --backend live --ranks 8 --host megatron --policy static --policy moeless --verify
    """
    from moeless.cli import serving, tables
    from moeless.metrics import Result
    from moeless.metrics.catalogue import logged
    from moeless.tracking.run import start_run

    check_backend(BACKENDS, backend, given)
    asked = serving.simulated(given, quick) if backend == "sim" else serving.live(given, quick, out, dry_run)
    if dry_run:
        common.dry_run(asked.resolved, asked.estimate)
    cells = []
    with start_run("serve-bench", asked.name, asked.resolved, given["seed"], asked.inputs, out, wandb) as run:
        for cell in asked.serve(run):
            cells.append(cell)
            run.log(logged(cell))
            for warning in cell.warnings:
                run.warn(f"{asked.label.format(cell)}: {warning}")
        result = Result(str(run.manifest["command_line"]), tuple(cells))
        run.write_result(result)
        asked.check(cells)
    parts = [*tables.cell_tables(cells), *tables.verification_table(cells), *tables.prediction_table(cells)]
    return common.Report(result.to_json(), [*parts, f"run folder: {run.path}"])
