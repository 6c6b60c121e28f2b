"""``moeless serve-bench``: a workload under several policies, their latency and their bills."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moeless.cli import common

if TYPE_CHECKING:
    from moeless.metrics import Cell
    from moeless.simulator.bench import BenchConfig
    from moeless.tuning.presets import Preset

DEFAULT_POLICIES = ["static", "eplb:history", "oracle"]
COLUMNS = [
    "policy",
    "mean ms",
    "p99 ms",
    "vs static",
    "imbalance",
    "replicas",
    "warm",
    "TTFT ms",
    "TPOT ms",
    "p99 E2E s",
    "paper GB·s",
    "vs static",
    "resident GB·s",
    "vs static",
    "GPU·s",
]


def command(
    backend: Annotated[Literal["sim"], typer.Option("--backend", help="Where it runs.")] = "sim",
    trace: Annotated[Path | None, typer.Option("--trace", metavar="DIR", help="Routing trace of kind tokens.")] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", help="planner[:predictor[:distance]]; repeatable. Default: static, eplb, oracle."),
    ] = None,
    preset: Annotated[
        list[Path] | None, typer.Option("--preset", metavar="FILE", help="Tuned policy (moeless tune); repeatable.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Model preset; default: the trace's own shapes.")] = None,
    cluster: Annotated[str, typer.Option("--cluster", help="Cluster: a6000x8, h100x8, h100x8xN, ...")] = "h100x8",
    arrivals: Annotated[
        str, typer.Option("--arrivals", help="azure-like, poisson:RATE, ..., or a request trace's file.")
    ] = "azure-like",
    lengths: Annotated[
        str, typer.Option("--lengths", help="Token counts of the trace, or of the arrivals (resampled).")
    ] = "trace",
    request_rate: Annotated[float | None, typer.Option("--request-rate", help="Mean requests per second.")] = None,
    burstiness: Annotated[float | None, typer.Option("--burstiness", help="Gamma shape; below 1 is burstier.")] = None,
    batching: Annotated[str, typer.Option("--batching", help="continuous or one-second (the paper).")] = "continuous",
    token_budget: Annotated[int, typer.Option("--token-budget", min=1, help="Tokens of an iteration at most.")] = 8192,
    max_running: Annotated[int, typer.Option("--max-running", min=1, help="Running requests at most.")] = 256,
    costs: Annotated[
        list[str] | None, typer.Option("--costs", help="Cost model; repeatable. Default: paper, roofline.")
    ] = None,
    predictor: Annotated[
        list[Path] | None, typer.Option("--predictor", metavar="DIR", help="Fitted predictor; repeatable.")
    ] = None,
    extra_slots: Annotated[int, typer.Option("--extra-slots", min=0, help="Extra copies per GPU and layer.")] = 1,
    keep_alive: Annotated[float, typer.Option("--keep-alive", min=0.0, help="Seconds that idle copies stay.")] = 10.0,
    home: Annotated[str, typer.Option("--home", help="Where experts' weights always are: host or storage.")] = "host",
    replan: Annotated[float, typer.Option("--replan", help="Seconds between EPLB's plans.")] = 600.0,
    copies: Annotated[
        str, typer.Option("--copies", help="instant, timed, or auto: instant under the paper's costs only.")
    ] = "auto",
    max_requests: Annotated[int | None, typer.Option("--max-requests", min=1, help="Requests at most.")] = None,
    duration: Annotated[float | None, typer.Option("--duration", help="Seconds of arrivals.")] = None,
    goodput: Annotated[
        list[str] | None, typer.Option("--goodput", help="Objectives such as ttft:500 tpot:50, in milliseconds.")
    ] = None,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="First iterations left out of layer figures.")] = 0,
    quick: common.QuickOption = False,
    seed: common.SeedOption = 0,
    out: common.RunFolderOption = None,
    wandb: common.WandbOption = None,
    as_json: common.JsonOption = False,
    dry_run: common.DryRunOption = False,
    config: common.ConfigOption = None,
) -> None:
    """Serve a workload under each policy and cost model; compare latency, balance and three bills.

    Example: moeless serve-bench --backend sim --trace traces/gpt-oss --policy static --policy eplb:history
    """
    from moeless.contracts import Policy
    from moeless.errors import UserError
    from moeless.metrics import Result
    from moeless.metrics.requests import parse_goodput
    from moeless.simulator.bench import Bench, BenchConfig
    from moeless.tracking.run import start_run

    if trace is None:
        raise UserError("serve-bench needs --trace DIR, a routing trace made by `moeless trace` or import-trace")
    if copies not in ("instant", "timed", "auto"):
        raise UserError(f"--copies is {copies!r}, it must be instant, timed or auto")
    limit = max_requests if max_requests is not None else None if duration is not None else 1000
    bench_config = BenchConfig(
        trace=trace,
        policies=tuple(Policy.parse(text) for text in policy or DEFAULT_POLICIES),
        costs=tuple(costs or ("paper", "roofline")),
        cluster=cluster,
        model=model,
        arrivals=arrivals,
        lengths=lengths,
        request_rate=request_rate,
        burstiness=burstiness,
        batching=batching,
        token_budget=token_budget,
        max_running=max_running,
        predictors=tuple(predictor or ()),
        extra_slots=extra_slots,
        max_requests=min(limit or 100, 100) if quick else limit,
        duration=duration,
        objectives=parse_goodput(goodput or []),
        warmup=warmup,
        keep_alive=keep_alive,
        home=home,
        replan_seconds=replan,
        instant_copies={"instant": True, "timed": False}.get(copies),
        seed=seed,
    )
    presets: list[Preset] = []
    if preset:
        from moeless.tuning.presets import load_preset, run_presets

        presets = [load_preset(path) for path in preset]
    bench = Bench(bench_config)
    resolved = _plain(bench_config) | {"presets": [str(path) for path in preset or ()]}
    if dry_run:
        common.dry_run(resolved, bench.estimate())
    inputs = [trace, *bench_config.predictors, *(preset or ())]
    if Path(arrivals).is_file():
        inputs.append(Path(arrivals))
    cells: list[Cell] = []
    with start_run("serve-bench", bench.spec.name, resolved, seed, inputs, out, wandb) as run:
        with common.progress() as bar:
            total = len(bench.workload.requests)
            task = bar.add_task("", total=total * (len(bench.cells) + len(presets) * len(bench_config.costs)))
            done = 0

            def tick(name: str, completed: int) -> None:
                bar.update(task, completed=done + completed, description=name)

            runs = bench.run(tick)
            if presets:
                runs = itertools.chain(runs, run_presets(bench, presets, tick))
            for simulation in runs:
                cells.append(simulation.cell)
                done += total
                run.log(_row(simulation.cell))
                for warning in simulation.cell.warnings:
                    run.warn(f"{simulation.cell.policy} under {simulation.cell.costs}: {warning}")
        result = Result(str(run.manifest["command_line"]), tuple(cells))
        run.write_result(result)
    if as_json:
        common.print_json(result.to_json())
        return
    _show(cells)
    common.remarks.print(f"run folder: {run.path}")


def _plain(config: BenchConfig) -> dict[str, Any]:
    plain = dataclasses.asdict(config)
    return plain | {"policies": [str(p) for p in config.policies], "trace": str(config.trace)}


def _row(cell: Cell) -> dict[str, Any]:
    request = cell.request
    return {
        "policy": cell.policy,
        "costs": cell.costs,
        "layer_mean_ms": cell.layer.mean_ms,
        "layer_p99_ms": cell.layer.p99_ms,
        "imbalance": cell.layer.imbalance,
        "replicas": cell.layer.replicas,
        "mean_ttft_ms": request.mean_ttft_ms if request else None,
        "mean_tpot_ms": request.mean_tpot_ms if request else None,
        "bill_paper": cell.billing.paper,
        "bill_resident": cell.billing.resident,
        "bill_gpu_seconds": cell.billing.gpu_seconds,
    }


def _show(cells: list[Cell]) -> None:
    for costs in dict.fromkeys(cell.costs for cell in cells):
        mine = [cell for cell in cells if cell.costs == costs]
        base = next((cell for cell in mine if cell.policy == "static"), None)
        first = mine[0]
        title = (
            f"{first.model} on {first.cluster}, {costs} costs, {first.evidence} ({first.layer.samples:,} layer runs)"
        )
        common.show(common.table(title, COLUMNS, [_cells_of(cell, base) for cell in mine]))
        for warning in dict.fromkeys(warning for cell in mine for warning in cell.warnings):
            who = [cell.policy for cell in mine if warning in cell.warnings]
            common.remarks.print(f"! {'all' if len(who) == len(mine) else ', '.join(who)}: {warning}")


def _cells_of(cell: Cell, base: Cell | None) -> list[Any]:
    request, bill, layer = cell.request, cell.billing, cell.layer

    def against(mine: float, theirs: float | None) -> str | None:
        return f"{100 * (mine / theirs - 1):+.1f} %" if theirs else None

    return [
        cell.policy + (" (lossy)" if cell.lossy else ""),
        f"{layer.mean_ms:.4f}",
        f"{layer.p99_ms:.4f}",
        against(layer.mean_ms, base.layer.mean_ms if base else None),
        f"{layer.imbalance:.3f}",
        f"{layer.replicas:.1f}",
        f"{100 * layer.warm_rate:.1f} %",
        f"{request.mean_ttft_ms:.1f}" if request else None,
        f"{request.mean_tpot_ms:.2f}" if request and request.mean_tpot_ms is not None else None,
        f"{request.p99_e2el_ms / 1e3:.2f}" if request else None,
        bill.paper,
        against(bill.paper, base.billing.paper if base else None),
        bill.resident,
        against(bill.resident, base.billing.resident if base else None),
        bill.gpu_seconds,
    ]
