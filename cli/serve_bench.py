"""``moeless serve-bench``: a workload under several policies, their latency and their bills."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moeless.cli import common

if TYPE_CHECKING:
    from moeless.metrics import Cell
    from moeless.simulator.bench import BenchConfig

DEFAULT_POLICIES = ["static", "eplb:history", "oracle"]


def command(
    backend: Annotated[
        Literal["sim", "live"], typer.Option("--backend", help="On the simulator, or live on ranks of this machine.")
    ] = "sim",
    trace: Annotated[Path | None, typer.Option("--trace", metavar="DIR", help="Routing trace of kind tokens.")] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", help="planner[:predictor[:distance or auto]]; repeatable. Default: static, eplb, oracle."
        ),
    ] = None,
    preset: Annotated[
        list[Path] | None, typer.Option("--preset", metavar="FILE", help="Tuned policy (moeless tune); repeatable.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Model preset; default: the trace's own shapes.")] = None,
    cluster: Annotated[
        list[str] | None, typer.Option("--cluster", help="a6000x8, h100x8 (default), h100x8xN; repeatable: a sweep.")
    ] = None,
    arrivals: Annotated[
        str, typer.Option("--arrivals", help="azure-like, poisson:RATE, ..., or a request trace's file.")
    ] = "azure-like",
    lengths: Annotated[
        str, typer.Option("--lengths", help="Token counts of the trace, or of the arrivals (resampled).")
    ] = "trace",
    request_rate: Annotated[
        list[float] | None, typer.Option("--request-rate", help="Mean requests per second; repeatable: a sweep.")
    ] = None,
    burstiness: Annotated[float | None, typer.Option("--burstiness", help="Gamma shape; below 1 is burstier.")] = None,
    arrivals_window: Annotated[
        str | None, typer.Option("--arrivals-window", metavar="START:STOP", help="Seconds of an arrivals file.")
    ] = None,
    time_scale: Annotated[
        float, typer.Option("--time-scale", help="Factor on arrival times; 0.5 doubles the rate.")
    ] = 1.0,
    batching: Annotated[
        str, typer.Option("--batching", help="continuous[:prefill-first][:whole-prompts] or one-second (the paper).")
    ] = "continuous",
    token_budget: Annotated[int, typer.Option("--token-budget", min=1, help="Tokens of an iteration at most.")] = 8192,
    max_running: Annotated[int, typer.Option("--max-running", min=1, help="Running requests at most.")] = 256,
    costs: Annotated[
        list[str] | None, typer.Option("--costs", help="Cost model; repeatable. Default: paper, roofline.")
    ] = None,
    predictor: Annotated[
        list[Path] | None, typer.Option("--predictor", metavar="DIR", help="Fitted predictor; repeatable.")
    ] = None,
    extra_slots: Annotated[int, typer.Option("--extra-slots", min=0, help="Extra copies per GPU and layer.")] = 1,
    keep_alive: Annotated[
        str, typer.Option("--keep-alive", help="Of idle copies: SECONDS, lru, or adaptive[:SECONDS].")
    ] = "10",
    scale_to_zero: Annotated[
        bool, typer.Option("--scale-to-zero", help="Serverless policies give GPUs back while idle.")
    ] = False,
    requests_per_gpu: Annotated[
        float | None,
        typer.Option(
            "--requests-per-gpu", help="Serverless policies hold a GPU per so many requests, as memory allows."
        ),
    ] = None,
    container: Annotated[float, typer.Option("--container", min=0.0, help="Seconds to start a GPU container.")] = 1.0,
    start: Annotated[
        float, typer.Option("--start", min=0.0, help="Seconds to start a copy's instance, beside its transfer.")
    ] = 0.0,
    fail_gpu: Annotated[
        list[str] | None, typer.Option("--fail-gpu", help="SECONDS:GPU[:RESTART_SECONDS]; repeatable.")
    ] = None,
    home: Annotated[str, typer.Option("--home", help="Where experts' weights always are: host or storage.")] = "host",
    replan: Annotated[
        float | None, typer.Option("--replan", help="Seconds between EPLB's plans; default: 600, live 2.")
    ] = None,
    plan_every: Annotated[
        int, typer.Option("--plan-every", min=1, help="Iterations between plans of moeless, elastic; 1: the paper.")
    ] = 1,
    copies: Annotated[
        str, typer.Option("--copies", help="instant, timed, or auto: instant under the paper's costs only.")
    ] = "auto",
    max_requests: Annotated[int | None, typer.Option("--max-requests", min=1, help="Requests at most.")] = None,
    duration: Annotated[float | None, typer.Option("--duration", help="Seconds of arrivals.")] = None,
    goodput: Annotated[
        list[str] | None, typer.Option("--goodput", help="Objectives such as ttft:500 tpot:50, in milliseconds.")
    ] = None,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="First iterations left out of layer figures.")] = 0,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="FILE", help="Keep finished cells here; run only the others.")
    ] = None,
    timeline: Annotated[
        str | None, typer.Option("--timeline", help="START:STOP seconds of the first cell, as a Chrome trace.")
    ] = None,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="live: expert-parallel ranks.")] = 2,
    host: Annotated[str, typer.Option("--host", help="live: megatron or transformers.")] = "transformers",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option("--device", help="live: auto takes GPUs where there are enough.")
    ] = "auto",
    launcher: Annotated[
        Literal["auto", "fork", "torchrun"],
        typer.Option("--launcher", help="live: how ranks start; auto forks on CPUs, torchrun on GPUs."),
    ] = "auto",
    dtype: Annotated[str | None, typer.Option("--dtype", help="live: float32, bfloat16 or float16.")] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="live: prompt file, folder or hub id; default: the bundled ones.")
    ] = None,
    max_prompt: Annotated[int, typer.Option("--max-prompt", min=1, help="live: prompt tokens at most.")] = 256,
    max_output: Annotated[int, typer.Option("--max-output", min=1, help="live: output tokens at most.")] = 32,
    skip_below: Annotated[
        int, typer.Option("--skip-below", min=0, help="live: smaller iterations use primaries only, unplanned.")
    ] = 0,
    copy_from: Annotated[
        Literal["auto", "peer", "host"],
        typer.Option("--copy-from", help="live: copies from other ranks or host memory; auto takes the cheaper."),
    ] = "auto",
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="live: 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="live: probability to sample among.")] = 1.0,
    verify: Annotated[bool, typer.Option("--verify", help="live: compare outputs with the unmodified model.")] = False,
    predict: Annotated[
        bool, typer.Option("--predict/--no-predict", help="live: the simulator's figures for the same run beside.")
    ] = True,
    record: Annotated[
        bool, typer.Option("--record", help="live: write the first policy's routing as a trace.")
    ] = False,
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

    Live: moeless serve-bench --backend live --ranks 8 --host megatron --policy static --policy moeless --verify
    """
    from moeless.cli.tables import show_cells
    from moeless.contracts import Policy
    from moeless.errors import UserError
    from moeless.metrics import Result
    from moeless.metrics.catalogue import logged
    from moeless.metrics.requests import parse_goodput
    from moeless.serverless import KeepAlive
    from moeless.simulator.bench import Bench, BenchConfig
    from moeless.simulator.failures import Failure
    from moeless.simulator.sweep import check_points, points, run_sweep
    from moeless.simulator.timeline import Timeline
    from moeless.tracking.run import start_run
    from moeless.tuning.presets import load_preset, run_presets
    from moeless.workloads.arrivals import parse_window

    arrivals_seconds = None if arrivals_window is None else parse_window(arrivals_window)
    if backend == "live":
        from moeless.cli.serve_live import prediction_table, run_live, verification_table
        from moeless.engine.bench import LiveConfig
        from moeless.engine.workload import WorkloadSettings

        if trace is not None or preset:
            raise UserError("--trace and --preset belong to --backend sim; a live run routes for itself")
        if scale_to_zero or requests_per_gpu or fail_gpu or resume or timeline:
            raise UserError(
                "--scale-to-zero, --requests-per-gpu, --fail-gpu, --resume and --timeline belong to --backend sim"
            )
        if max(len(cluster or []), len(request_rate or [])) > 1:
            raise UserError("a live run has one cluster and one request rate; sweeps belong to --backend sim")
        if len(costs or []) > 1:
            raise UserError("a live run plans by one cost model; give --costs once")
        workload = WorkloadSettings(
            prompts=prompts,
            arrivals=arrivals,
            request_rate=request_rate[0] if request_rate else None,
            burstiness=burstiness,
            window=arrivals_seconds,
            time_scale=time_scale,
            duration=duration,
            requests=min(max_requests or 50, 8) if quick else max_requests or 50,
            prompt_tokens=max_prompt,
            output_tokens=max_output,
            seed=seed,
        )
        live_config = LiveConfig(
            policies=tuple(policy or DEFAULT_POLICIES),
            workload=workload,
            model=None if model in (None, "bundled") else Path(str(model)),
            host=host,
            ranks=ranks,
            device=device,
            launcher=launcher,
            dtype=dtype,
            cluster=cluster[0] if cluster else None,
            costs=costs[0] if costs else None,
            batching=batching,
            token_budget=token_budget,
            max_running=max_running,
            extra_slots=extra_slots,
            keep_alive=keep_alive,
            copy_from=copy_from,
            replan_seconds=2.0 if replan is None else replan,
            skip_below_tokens=skip_below,
            plan_every=plan_every,
            predictors=tuple(predictor or ()),
            objectives=parse_goodput(goodput or []),
            warmup=warmup,
            temperature=temperature,
            top_p=top_p,
            verify=verify,
            record=record,
            predict=predict,
            seed=seed,
        )
        cells, folder, command_line = run_live(live_config, out=out, wandb=wandb, dry_run=dry_run, row=logged)
        if as_json:
            common.print_json(Result(command_line, tuple(cells)).to_json())
            return
        show_cells(cells)
        verification_table(cells)
        prediction_table(cells)
        common.remarks.print(f"run folder: {folder}")
        return
    if trace is None:
        raise UserError("serve-bench needs --trace DIR, a routing trace made by `moeless trace` or import-trace")
    if copies not in ("instant", "timed", "auto"):
        raise UserError(f"--copies is {copies!r}, it must be instant, timed or auto")
    bounded = duration is not None or arrivals_seconds is not None
    limit = max_requests if max_requests is not None else None if bounded else 1000
    bench_config = BenchConfig(
        trace=trace,
        policies=tuple(Policy.parse(text) for text in policy or DEFAULT_POLICIES),
        costs=tuple(costs or ("paper", "roofline")),
        cluster=(cluster or ["h100x8"])[0],
        model=model,
        arrivals=arrivals,
        lengths=lengths,
        request_rate=request_rate[0] if request_rate else None,
        burstiness=burstiness,
        batching=batching,
        token_budget=token_budget,
        max_running=max_running,
        predictors=tuple(predictor or ()),
        extra_slots=extra_slots,
        max_requests=min(limit or 100, 100) if quick else limit,
        duration=duration,
        arrivals_window=arrivals_seconds,
        time_scale=time_scale,
        objectives=parse_goodput(goodput or []),
        warmup=warmup,
        keep_alive=keep_alive,
        scale_to_zero=scale_to_zero,
        requests_per_gpu=requests_per_gpu,
        container_seconds=container,
        start_seconds=start,
        failures=tuple(Failure.parse(text) for text in fail_gpu or ()),
        home=home,
        replan_seconds=600.0 if replan is None else replan,
        plan_every=plan_every,
        instant_copies={"instant": True, "timed": False}.get(copies),
        seed=seed,
    )
    KeepAlive.parse(keep_alive)
    window = Timeline.parse(timeline) if timeline else None
    presets = [load_preset(path) for path in preset or ()]
    planned = points(bench_config, request_rate or [None], cluster or ["h100x8"])
    bench = Bench(bench_config)
    check_points(planned, bench)
    resolved = _plain(bench_config) | {"request_rate": request_rate, "cluster": cluster or ["h100x8"]}
    if dry_run:
        common.dry_run(resolved, bench.estimate() | {"cells": len(planned)})
    inputs = [trace, *bench_config.predictors, *(preset or ())]
    if Path(arrivals).is_file():
        inputs.append(Path(arrivals))
    cells = []
    with start_run("serve-bench", bench.spec.name, resolved, seed, inputs, out, wandb) as run:
        with common.progress() as bar:
            total = len(bench.workload.requests)
            task = bar.add_task("", total=total * (len(planned) + len(presets) * len(bench_config.costs)))

            def tick(name: str, completed: int) -> None:
                bar.update(task, completed=len(cells) * total + completed, description=name)

            def keep(cell: Cell) -> None:
                cells.append(cell)
                run.log(logged(cell))
                for warning in cell.warnings:
                    run.warn(f"{cell.policy} under {cell.costs}: {warning}")

            for _, cell in run_sweep(planned, resume, tick):
                keep(cell)
            for simulation in run_presets(bench, presets, tick):
                keep(simulation.cell)
            if window is not None:
                bench.run_cell(bench_config.costs[0], bench_config.policies[0], timeline=window)
                if not window.write(run.path / "timeline.json"):
                    empty = f"nothing happened in the timeline's window {timeline}"
                    run.warn(empty)
                    common.remarks.print(f"! {empty}")
                run.produced(run.path / "timeline.json", "timeline")
        result = Result(str(run.manifest["command_line"]), tuple(cells))
        run.write_result(result)
    if as_json:
        common.print_json(result.to_json())
        return
    show_cells(cells)
    common.remarks.print(f"run folder: {run.path}")


def _plain(config: BenchConfig) -> dict[str, Any]:
    plain = dataclasses.asdict(config)
    return plain | {"policies": [str(p) for p in config.policies], "trace": str(config.trace)}
