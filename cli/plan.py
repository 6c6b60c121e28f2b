"""``moeless plan``: replicas and placement of every layer, from a trace's loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from moeless.cli import common
from moeless.errors import UserError
from moeless.simulator.options import BenchConfig

#: Options that simulations have, too.
SHARED = ("cluster", "costs", "extra_slots", "seed")


class PlanPhase(StrEnum):
    """Which rows of the trace the plan is for."""

    prefill = "prefill"
    decode = "decode"
    all = "all"


@common.command({"sim": BenchConfig}, only=SHARED, defaults={"costs": "roofline"})
def command(
    given: Mapping[str, Any],
    trace: Annotated[Path, typer.Argument(help="Trace folder, of any kind.")],
    planner: Annotated[str, typer.Option("--planner", metavar="NAME", help="Planner, for example eplb.")] = "eplb",
    phase: Annotated[PlanPhase, typer.Option("--phase", help="Rows that count.")] = PlanPhase.all,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of the iteration to plan for.")] = 4096,
    param: Annotated[
        list[str] | None, typer.Option("--param", metavar="NAME=VALUE", help="A planner parameter; repeatable.")
    ] = None,
    out: common.ArtefactOption = Path("plan.json"),
    wandb: common.KeptRunOption = None,
    dry: common.DryRunOption = False,
) -> common.Report:
    """Plan every layer for the loads of a trace.

    Example: moeless plan trace/ --planner eplb --cluster h100x8 --extra-slots 1 --out plan.json
    """
    from moeless.cluster import cluster as cluster_named
    from moeless.contracts import Budget, Phase
    from moeless.costs import COSTS
    from moeless.files import check_writable, write_json
    from moeless.placement import PLANNERS
    from moeless.placement.params import make_params, parse_assignments
    from moeless.placement.setting import Setting
    from moeless.placement.trace_loads import forecasts, iteration_loads
    from moeless.placement.whole_model import plan_model, summarise
    from moeless.traces.store import open_trace

    cluster, costs, extra_slots, seed = (given[name] for name in SHARED)
    chosen = PLANNERS.get(planner)
    machine = cluster_named(cluster)
    factory = COSTS.get(costs)
    params = make_params(chosen, parse_assignments(param or []))
    opened = open_trace(trace)
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; name the plan's file")
    check_writable(out)
    spec = opened.spec
    budget = Budget.even(spec.E, machine.num_gpus, extra_slots, spec.expert_bytes)
    setting = Setting(spec, machine, factory(spec, machine), budget, params)
    settings = {
        "trace": str(trace),
        "planner": planner,
        "params": dataclasses.asdict(params),
        "cluster": machine.name,
        "extra_slots": extra_slots,
        "costs": costs,
        "phase": phase.value,
        "tokens": tokens,
    }
    if dry:
        plan_bytes = float(budget.bytes_G.sum()) * spec.L
        common.dry_run(settings | {"out": str(out)}, {"layers": spec.L, "largest_plan_bytes": plan_bytes})
    row_phase = {PlanPhase.prefill: Phase.PREFILL, PlanPhase.decode: Phase.DECODE}.get(phase)
    load_ILE = iteration_loads(opened, tokens, row_phase)
    forecast_L = forecasts(load_ILE, tokens, spec.K, f"mean of {len(load_ILE)} iterations of the trace")
    with common.artefact_run("plan", f"{planner}-{spec.name}", settings, seed, [trace], wandb) as run:
        made = plan_model(
            chosen,
            forecast_L,
            setting,
            phase=row_phase if row_phase is not None else Phase.MIXED,
            notes=settings | {"moe_layers": list(spec.moe_layers), "num_layers": spec.num_layers},
        )
        summary = summarise(made, chosen, forecast_L, setting)
        write_json(out, made.to_json())
        if run is not None:
            run.log(dataclasses.asdict(summary))
            run.produced(out, "plan")
    rows = [
        ["extra replicas, all layers", str(summary.extras), "0"],
        ["memory of extras (GB)", f"{summary.extra_bytes / 1e9:.3f}", "0"],
        ["imbalance at expected loads", f"{summary.imbalance:.3f}", f"{summary.static_imbalance:.3f}"],
        [f"layer time, {costs} costs (µs)", f"{summary.seconds * 1e6:.1f}", f"{summary.static_seconds * 1e6:.1f}"],
    ]
    title = f"{planner} on {machine.name}: {spec.name}, {spec.L} layers, {tokens} tokens -> {out}"
    compared = common.table(title, ["mean over layers", planner, "static"], rows)
    return common.Report({"out": str(out)} | dataclasses.asdict(summary), [compared])
