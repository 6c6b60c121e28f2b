"""The tuning loop: trials through the simulator, until the study has as many as were wanted."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from moeless.contracts import Policy
from moeless.errors import RunFailed, UserError
from moeless.files import sha256
from moeless.metrics.catalogue import Metric, objectives
from moeless.metrics.result import Cell
from moeless.placement import PLANNERS
from moeless.simulator.bench import Bench, BenchConfig
from moeless.tuning import storage, workers
from moeless.tuning.presets import Preset, apply_preset, run_presets
from moeless.tuning.sampler import SeededByTrial
from moeless.tuning.space import SERVERLESS, Axis, Value, search_space
from moeless.workloads.arrivals import read_arrivals

#: Share of the requests after which a single-objective trial may be pruned.
FIRST_RUNG = 0.25
#: Fewer requests than this are served whole: a part of them would say little.
RUNG_REQUESTS = 40
#: Seconds between two looks at other processes' trials when nothing is left to run.
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class TuningConfig:
    """What is tuned, on what, for what.

    Attributes:
        bench: workload and assumptions; one policy, one cost model; its ``part`` and window are set here.
        trials: how many the study shall have, over all processes that share it.
        objective_names: of ``moeless.tuning.OBJECTIVES``; several give a Pareto front.
        ranges: axes by parameter, in place of the default ones.
        storage: journal file or database URL.
        study: its name there.
    """

    bench: BenchConfig
    trials: int
    objective_names: tuple[str, ...]
    storage: str
    study: str
    ranges: Mapping[str, Axis | str] = field(default_factory=dict)


class Tuning:
    """A study: open it, ``run`` trials, look at ``pareto``, test on ``held_out`` data.

    Raises:
        UserError: anything in the configuration is wrong; nothing has been run or written by then.
    """

    def __init__(self, config: TuningConfig) -> None:
        if config.trials < 1:
            raise UserError(f"a study needs at least one trial, got {config.trials}")
        if len(config.bench.policies) != 1 or len(config.bench.costs) != 1:
            raise UserError("tuning takes one policy and one cost model at a time")
        self.config = config
        self.policy: Policy = config.bench.policies[0]
        self.costs = config.bench.costs[0]
        if self.policy.planner == "oracle":
            raise UserError("the oracle overrides routing and has nothing to tune")
        self.planner = PLANNERS.get(self.policy.planner)
        self.objectives: tuple[Metric, ...] = objectives(config.objective_names)
        self.defaults: dict[str, Value] = {name: getattr(config.bench, name) for name in SERVERLESS}
        self.axes, self.left = search_space(self.planner, self.defaults, config.ranges)
        self._tune, self._test = _split(config.bench)
        self.bench = Bench(self._tune)

    @property
    def default_values(self) -> dict[str, Value]:
        """The searched parameters at their defaults."""
        own = self.planner.params()
        return {a.name: self.defaults[a.name] if a.name in SERVERLESS else getattr(own, a.name) for a in self.axes}

    def _settings(self) -> dict[str, Any]:
        """What two processes must agree on to share a study."""
        bench = self._tune
        return {
            "policy": str(self.policy),
            "costs": self.costs,
            "objectives": [objective.objective for objective in self.objectives],
            "space": {axis.name: axis.to_json() for axis in self.axes},
            "trace": sha256(bench.trace / "trace.json"),
            "model": self.bench.spec.name,
            "cluster": bench.cluster,
            "arrivals": Path(bench.arrivals).name,
            "workload": [bench.lengths, bench.request_rate, bench.burstiness, bench.max_requests, bench.duration],
            "batching": [bench.batching, bench.token_budget, bench.max_running],
            "assumptions": [bench.home, bench.instant_copies, bench.warmup],
            "goodput": [str(limit) for limit in bench.objectives],
            "seed": bench.seed,
        }

    def open(self) -> optuna.Study:
        """Create or continue the study; its first trial is the policy as it is by default."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        single = len(self.objectives) == 1
        study = storage.open_study(
            self.config.storage,
            self.config.study,
            ["maximize" if objective.maximise else "minimize" for objective in self.objectives],
            self._settings(),
            SeededByTrial(self._tune.seed),
            optuna.pruners.MedianPruner(n_startup_trials=5) if single else optuna.pruners.NopPruner(),
        )
        if all(axis.holds(self.default_values[axis.name]) for axis in self.axes):
            study.enqueue_trial(self.default_values, skip_if_exists=True)
        return study

    def run(
        self,
        study: optuna.Study,
        report: Callable[[FrozenTrial], None] = lambda _: None,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """Run trials until the study has enough.

        Args:
            report: gets each trial of this process as it ends.
            waiting: called once, when only trials of other processes are left, some of which may have died.

        Raises:
            RunFailed: not one trial of the study gave a value, or its storage went away.
        """
        with storage.kept(self.config.storage):
            self._fill(study, report, waiting)
        if not study.get_trials(False, (TrialState.COMPLETE,)):
            reasons = [trial.user_attrs.get(workers.REASON, "pruned") for trial in study.trials]
            raise RunFailed(f"no trial of study {self.config.study!r} gave a value; the last one: {reasons[-1]}")

    def _fill(self, study: optuna.Study, report: Callable[[FrozenTrial], None], waiting: Callable[[], None]) -> None:
        watch, told = workers.Watch(study), False
        while True:
            watch.reap()
            if watch.counted() >= self.config.trials:
                if not watch.unsure():
                    return
                if not told:
                    waiting()
                told = True
                time.sleep(POLL_SECONDS)
                continue
            trial = study.ask()
            try:
                study.tell(trial, **self._attempt(study, trial))
            except BaseException as error:
                if isinstance(error, Exception) and workers.taken(study, trial):
                    continue
                # interrupted: without a reason it does not count, and its values are tried again
                with contextlib.suppress(Exception):
                    study.tell(trial, state=TrialState.FAIL)
                    study.enqueue_trial(trial.params, skip_if_exists=False)
                raise
            report(study.trials[trial.number])

    def _attempt(self, study: optuna.Study, trial: optuna.Trial) -> dict[str, Any]:
        """One trial's outcome, as ``Study.tell`` takes it; its attributes say why it failed."""
        try:
            with workers.working(trial):
                values = {axis.name: axis.suggest(trial) for axis in self.axes}
                return self._trial(study, trial, values)
        except UserError as error:
            # these values are refused by the planner or the simulator: a result of the search, not its end
            trial.set_user_attr(workers.REASON, str(error))
            return {"state": TrialState.FAIL}

    def _trial(self, study: optuna.Study, trial: optuna.Trial, values: Mapping[str, Value]) -> dict[str, Any]:
        """One trial's outcome, as ``Study.tell`` takes it."""
        bench = apply_preset(self.bench, Preset.split(f"trial {trial.number}", self.policy, values))
        total = len(bench.workload.requests)
        if len(self.objectives) == 1 and total >= RUNG_REQUESTS:
            first = round(total * FIRST_RUNG)
            rung = copy.copy(bench)
            rung.workload = replace(bench.workload, requests=bench.workload.requests[:first])
            (value,) = self.values(rung.run_cell(self.costs, self.policy).cell)
            trial.report(value, first)
            if trial.should_prune():
                return {"state": TrialState.PRUNED}
        cell = bench.run_cell(self.costs, self.policy).cell
        trial.set_user_attr("figures", _figures(cell))
        return {"values": self.values(cell)}

    def values(self, cell: Cell) -> list[float]:
        """The objectives' values.

        Raises:
            UserError: one is undefined in this run.
        """
        found = []
        for objective in self.objectives:
            value = objective.of(cell)
            if value is None or not np.isfinite(value):
                why = cell.warnings[-1] if cell.warnings else "the run leaves it undefined"
                raise UserError(f"{objective.label} is undefined: {why}")
            found.append(float(value))
        return found

    def pareto(self, study: optuna.Study) -> list[FrozenTrial]:
        """Trials that no other one beats in every objective, by the first objective; equal ones once."""
        seen: dict[tuple[float, ...], FrozenTrial] = {}
        for trial in study.best_trials:
            seen.setdefault(tuple(trial.values), trial)
        return sorted(seen.values(), key=lambda trial: trial.values[0], reverse=self.objectives[0].maximise)

    def knee(self, front: list[FrozenTrial]) -> FrozenTrial:
        """The front's trial nearest to its ideal point, each objective scaled to the front's own range."""
        points = np.array([trial.values for trial in front])
        points *= [-1.0 if objective.maximise else 1.0 for objective in self.objectives]
        low, high = points.min(0), points.max(0)
        scaled = (points - low) / np.where(high > low, high - low, 1.0)
        return front[int(np.argmin((scaled**2).sum(1)))]

    def preset(self, trial: FrozenTrial, name: str) -> Preset:
        """The trial's parameters as a preset."""
        tuned_on = {
            "costs": self.costs,
            "cluster": self.bench.cluster.name,
            "model": self.bench.spec.name,
            "study": self.config.study,
            "trial": trial.number,
            "settings": self._settings(),
            "values": dict(zip(self.config.objective_names, trial.values or (), strict=True)),
        }
        return Preset.split(name, self.policy, trial.params, provenance={"tuned_on": tuned_on})

    def held_out(self, presets: Sequence[Preset]) -> list[Cell]:
        """A cell of each preset, on requests and arrivals that tuning never saw."""
        return [done.cell for done in run_presets(Bench(self._test), presets)]


def _split(bench: BenchConfig) -> tuple[BenchConfig, BenchConfig]:
    """Tuning and held-out workloads: other requests of the trace; other seeds, or the other half of a file's time."""
    halves: list[tuple[float, float] | None] = [None, None]
    path = Path(bench.arrivals)
    if path.is_file():
        end = float(read_arrivals(path).time_N[-1])
        halves = [(0.0, end / 2), (end / 2, np.nextafter(end, np.inf))]
    tune = replace(bench, part="tune", arrivals_window=halves[0])
    return tune, replace(bench, part="test", arrivals_window=halves[1], seed=bench.seed + 1)


def _figures(cell: Cell) -> dict[str, Any]:
    """What every trial keeps beside its objectives."""
    return {
        "mean_ms": cell.layer.mean_ms,
        "p99_ms": cell.layer.p99_ms,
        "imbalance": cell.layer.imbalance,
        "replicas": cell.layer.replicas,
        "moved_bytes": cell.layer.moved_bytes,
        "warm_rate": cell.layer.warm_rate,
        "bill_resident": cell.billing.resident,
        "bill_paper": cell.billing.paper,
        "bill_gpu_seconds": cell.billing.gpu_seconds,
    }
