"""``moeless tune``: search a policy's parameters through the simulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from moeless.cli import common
from moeless.simulator.options import BenchConfig

#: Options of simulations that tuning does not search or set itself.
SHARED = (
    *("policies", "predictors", "arrivals", "request_rate", "max_requests", "seed"),
    *("batching", "model", "cluster", "costs", "objectives", "home", "lengths"),
)

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from moeless.tuning import Tuning
    from moeless.tuning.outcome import Outcome


@common.command(
    {"sim": BenchConfig},
    only=SHARED,
    defaults={"policies": "moeless:history", "costs": "roofline", "max_requests": 50},
)
def command(
    given: Mapping[str, Any],
    trace: Annotated[Path, typer.Argument(help="Routing trace of kind tokens.")],
    objective: Annotated[
        list[str] | None,
        typer.Option("--objective", help="latency, cost, moved, ...; repeatable. Default: latency and cost."),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Trials of the study, over all processes.")] = 50,
    ranges: Annotated[
        list[str] | None,
        typer.Option("--range", metavar="NAME=LOW:HIGH[:log]", help="Search range, or NAME=A,B,C; repeatable."),
    ] = None,
    study: Annotated[str | None, typer.Option("--study", help="Name; one that exists is continued.")] = None,
    storage: Annotated[
        str, typer.Option("--storage", help="Journal file, or a database URL; several processes may share it.")
    ] = "results/studies.journal",
    quick: common.QuickOption = False,
    out: common.RunFolderOption = None,
    wandb: common.WandbOption = None,
    dry_run: common.DryRunOption = False,
) -> common.Report:
    """Search a policy's parameters; test what is found on requests that the search never saw.

    Tuning serves a part of the trace; another part, under other arrivals, tests the result. The same command
    again continues a study that was stopped; two at once share it. `serve-bench --preset FILE` uses the result.

    Example: moeless tune traces/gpt-oss --policy moeless:history --objective latency --objective cost --trials 40
    """
    from moeless.contracts import Policy
    from moeless.credentials import mask
    from moeless.metrics import Result
    from moeless.tracking.run import start_run
    from moeless.tuning import Tuning, TuningConfig, parse_ranges
    from moeless.tuning.outcome import conclude

    names = tuple(objective or ("latency", "cost"))
    policy = given["policies"]
    chosen = Policy.parse(policy)
    requests = given["max_requests"]
    bench = BenchConfig.given(
        given,
        trace=trace,
        policies=(chosen,),
        costs=(given["costs"],),
        max_requests=min(requests, 12) if quick else requests,
    )
    wanted = min(trials, 12) if quick else trials
    name = study or f"{policy}-{'-'.join(names)}"
    tuning = Tuning(TuningConfig(bench, wanted, names, storage, name, parse_ranges(ranges or [])))
    resolved = {
        **dataclasses.asdict(bench),
        "policies": [policy],
        "trials": wanted,
        "objectives": list(names),
        "storage": mask(storage),
        "study": name,
        "space": {axis.name: axis.to_json() for axis in tuning.axes},
        "left_at_default": list(tuning.left),
    }
    if dry_run:
        common.dry_run(resolved, tuning.bench.estimate() | {"trials": wanted})
    inputs = [trace, *bench.predictors, *(path for path in (Path(bench.arrivals),) if path.is_file())]
    opened = tuning.open()
    with start_run("tune", chosen.planner, resolved, bench.seed, inputs, out, wandb) as run:
        with common.progress() as bar:
            task = bar.add_task("trials", total=wanted)
            bar.update(task, completed=sum(trial.state.is_finished() for trial in opened.trials))

            def ended(trial: FrozenTrial) -> None:
                bar.advance(task)
                values = dict(zip(names, trial.values or [None] * len(names), strict=False))
                run.log({"trial": trial.number, "state": trial.state.name.lower(), **values, **trial.params})

            def waiting() -> None:
                common.remarks.print("waiting for a sign of life of the processes that run the last trials")

            tuning.run(opened, ended, waiting)
        outcome = conclude(tuning, opened, run.path)
        run.produced(run.path / "preset.json", "preset")
        run.produced(run.path / "tuning.json", "tuning")
        run.write_result(Result(str(run.manifest["command_line"]), outcome.cells))
        title, figure = _figure(tuning, outcome)
        run.figure("tuning", figure, title)
        for warning in dict.fromkeys(warning for cell in outcome.cells for warning in cell.warnings):
            run.warn(warning)
    left = [f"! {name} was left at its default: give --range {name}=LOW:HIGH to search it" for name in tuning.left]
    where = f"run folder: {run.path}; the preset for serve-bench: {run.path / 'preset.json'}"
    return common.Report(outcome.to_json(), [_table(tuning, outcome), *left, where])


def _figure(tuning: Tuning, outcome: Outcome) -> tuple[str, Any]:
    import numpy as np

    from moeless.report import charts

    title = f"Tuning {tuning.policy}, {tuning.bench.spec.name} on {tuning.bench.cluster.name}"
    labels = [objective.label for objective in tuning.objectives]
    if len(labels) == 1:
        value_N = [trial["values"][tuning.objectives[0].objective] for trial in outcome.trials]
        found = np.array([np.nan if value is None else value for value in value_N])
        return title, charts.progress(found, labels[0], maximise=tuning.objectives[0].maximise, title=title)
    row = {number: index for index, number in enumerate(outcome.trial_N)}
    trial_of = {point.name: row[point.trial] for point in outcome.rows if point.trial is not None}
    return title, charts.pareto(
        outcome.values_NM,
        [row[number] for number in outcome.front],
        labels,
        default=trial_of.get("default"),
        knee=trial_of[outcome.recommended],
        title=title,
    )


def _table(tuning: Tuning, outcome: Outcome) -> Table:
    names = [objective.objective for objective in tuning.objectives]
    columns = ["", *(axis.name for axis in tuning.axes), *names]
    columns += [column for name in names for column in (f"{name}, held out", "vs default")]
    base = outcome.rows[0].held_out
    rows = []
    for point in outcome.rows:
        cells: list[Any] = [point.name]
        values = [point.params.get(axis.name) for axis in tuning.axes]
        cells += [value if isinstance(value, float) else str(value) for value in values]
        cells += [point.tuned[name] for name in names]
        for name in names:
            mine, theirs = point.held_out[name], base[name]
            cells += [mine, f"{100 * (mine / theirs - 1):+.1f} %" if mine is not None and theirs else None]
        rows.append(cells)
    return common.table(f"{tuning.policy}, study {tuning.config.study}", columns, rows)
