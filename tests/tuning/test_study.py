"""Studies stop and go on, are shared, and find what the simulator confirms."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from moeless.errors import RunFailed, UserError
from moeless.simulator.bench import Bench
from moeless.tuning import Preset, Tuning, apply_preset, load_preset, workers
from moeless.tuning.outcome import conclude

Make = Callable[..., Tuning]


def run(tuning: Tuning) -> Any:
    study = tuning.open()
    tuning.run(study)
    return study


def history(study: Any) -> list[tuple[dict[str, Any], list[float]]]:
    return [(trial.params, trial.values) for trial in study.trials]


def test_the_first_trial_is_the_default_and_values_are_the_simulators(tuning_for: Make):
    tuning = tuning_for()
    study = run(tuning)
    assert len(study.trials) == 6
    assert study.trials[0].params == tuning.default_values
    for trial in study.trials[::3]:
        bench = apply_preset(tuning.bench, Preset.split("again", tuning.policy, trial.params))
        cell = bench.run_cell("roofline", tuning.policy).cell
        assert trial.values == [cell.layer.mean_ms, cell.billing.resident]
        assert trial.user_attrs["figures"]["moved_bytes"] == cell.layer.moved_bytes
    assert len({json.dumps(trial.params) for trial in study.trials}) == 6


def test_the_front_is_not_dominated_and_holds_the_knee(tuning_for: Make):
    tuning = tuning_for(trials=10, objective_names=("latency", "cost", "moved"))
    study = run(tuning)
    front = tuning.pareto(study)
    points = np.array([trial.values for trial in front])
    every = np.array([trial.values for trial in study.trials])
    for point in points:
        assert not ((every <= point).all(1) & (every < point).any(1)).any()
    assert tuning.knee(front) in front
    assert (np.diff(points[:, 0]) >= 0).all()


def test_a_stopped_study_goes_on_as_if_it_had_not_stopped(tuning_for: Make, tmp_path: Path):
    whole = history(run(tuning_for()))
    elsewhere = str(tmp_path / "other.journal")
    run(tuning_for(trials=3, storage=elsewhere))
    assert history(run(tuning_for(storage=elsewhere))) == whole
    # and with nothing left to do, nothing is done
    assert history(run(tuning_for(storage=elsewhere))) == whole


def test_an_interrupted_trial_is_tried_again(tuning_for: Make, monkeypatch: pytest.MonkeyPatch):
    tuning, calls = tuning_for(), []
    real = Bench.run_cell

    def interrupted(self: Bench, *args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **more)

    monkeypatch.setattr(Bench, "run_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tuning)
    study = run(tuning_for())
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.COMPLETE) == 6
    assert states.count(TrialState.FAIL) == 1
    assert study.trials[2].state == TrialState.FAIL
    assert study.trials[3].params == study.trials[2].params


def test_a_process_killed_before_it_says_whose_the_trial_is_leaves_a_study_that_goes_on(
    tuning_for: Make, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.4)
    tuning_for().open().ask()
    trials = run(tuning_for()).trials
    states = [trial.state for trial in trials]
    assert (states.count(TrialState.COMPLETE), states.count(TrialState.FAIL), len(states)) == (6, 1, 7)
    assert tuning_for().default_values in [trial.params for trial in trials if trial.state == TrialState.COMPLETE]


def _child(tuning: Tuning, slow: float) -> None:
    real = Bench.run_cell

    def slowed(self: Bench, *args: Any, **more: Any) -> Any:
        time.sleep(slow)
        return real(self, *args, **more)

    Bench.run_cell = slowed  # type: ignore[method-assign]
    run(tuning)
    os._exit(0)


def test_a_killed_process_leaves_a_study_that_goes_on(tuning_for: Make, monkeypatch: pytest.MonkeyPatch):
    tuning = tuning_for()
    study = tuning.open()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(tuning, 0.3))
    child.start()
    deadline = time.monotonic() + 120
    while sum(trial.state == TrialState.COMPLETE for trial in study.trials) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while not study.get_trials(states=(TrialState.RUNNING,)):
        assert time.monotonic() < deadline
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    # it may not have said yet whose the trial is
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.4)
    finished = run(tuning_for())
    states = [trial.state for trial in finished.trials]
    assert states.count(TrialState.COMPLETE) == 6
    assert TrialState.RUNNING not in states
    lost = [trial for trial in finished.trials if trial.state == TrialState.FAIL]
    assert len(lost) <= 1
    for trial in lost:
        # what it had drawn by then is tried again
        later = finished.trials[trial.number + 1 :]
        assert any(trial.params.items() <= other.params.items() for other in later)


@pytest.mark.parametrize("lock", ["kernel", "file"])
def test_two_processes_share_a_study(tuning_for: Make, tmp_path: Path, lock: str):
    tuning = tuning_for(storage=f"{tmp_path / 's.journal'}?lock={lock}")
    study = tuning.open()
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_child, args=(tuning, 0.05)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    done = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    # both may ask for the last trial at the same moment
    assert 6 <= len(done) <= 7
    ran = {trial.user_attrs[workers.WORKER]["pid"] for trial in done}
    assert ran == {child.pid for child in children}
    drawn = [json.dumps(trial.params, sort_keys=True) for trial in done]
    assert len(set(drawn)) >= 6


def test_a_study_is_not_continued_with_other_settings(tuning_for: Make):
    tuning_for().open()
    with pytest.raises(UserError, match=r"study 's' was begun with costs 'roofline', now it is 'paper'"):
        tuning_for(costs=("paper",)).open()
    with pytest.raises(UserError, match=r"begun with objectives .* choose another --study"):
        tuning_for(objective_names=("latency",)).open()
    tuning_for(costs=("paper",), study="t").open()


def test_a_database_url_is_storage_too(tuning_for: Make, tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    run(tuning_for(storage=url, trials=2))
    assert len(run(tuning_for(storage=url, trials=3)).trials) == 3


@pytest.mark.parametrize("where", ["nosuch://user@host/db", "sqlite:////nowhere/at/all.db"])
def test_storage_that_cannot_be_opened_gives_one_sentence(tuning_for: Make, where: str):
    with pytest.raises(UserError, match="cannot open the study's storage") as caught:
        tuning_for(storage=where).open()
    assert "\n" not in str(caught.value)


def test_a_folder_or_a_file_of_something_else_is_no_storage(tuning_for: Make, tmp_path: Path):
    with pytest.raises(UserError, match="is a folder"):
        tuning_for(storage=str(tmp_path)).open()
    (tmp_path / "notes.txt").write_text("not a journal\n")
    with pytest.raises(UserError, match="cannot open the study's storage"):
        tuning_for(storage=str(tmp_path / "notes.txt")).open()


def test_refused_parameters_are_failed_trials_and_a_study_of_nothing_else_fails(tuning_for: Make):
    mixed = tuning_for(ranges={"cv_threshold": "-1,0.2"}, trials=8, study="mixed")
    study = run(mixed)
    failed = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    assert failed
    assert all("cv_threshold" in trial.user_attrs[workers.REASON] for trial in failed)
    assert len(study.trials) == 8
    with pytest.raises(RunFailed, match="no trial of study 'none' gave a value; the last one: cv_threshold"):
        run(tuning_for(ranges={"cv_threshold": "-1:-0.5"}, study="none"))


def test_single_objective_trials_are_pruned_after_a_part_of_the_requests(tuning_for: Make):
    tuning = tuning_for(objective_names=("latency",), trials=16, max_requests=48)
    study = run(tuning)
    states = [trial.state for trial in study.trials]
    assert TrialState.PRUNED in states
    assert states.count(TrialState.COMPLETE) >= 5
    best = tuning.pareto(study)
    assert len(best) == 1
    assert best[0].values[0] == min(trial.values[0] for trial in study.trials if trial.state == TrialState.COMPLETE)
    assert best[0].values[0] <= study.trials[0].values[0]


def test_tuning_and_testing_share_no_request_and_no_arrival(tuning_for: Make, tmp_path: Path):
    tuning = tuning_for()
    tune, test = tuning.bench, Bench(tuning._test)
    assert not set(tune.served.row_T.tolist()) & set(test.served.row_T.tolist())
    assert [r.arrival for r in tune.workload.requests] != [r.arrival for r in test.workload.requests]
    file = tmp_path / "arrivals.csv"
    file.write_text("arrival\n" + "\n".join(str(t) for t in range(10)) + "\n")
    halves = tuning_for(arrivals=str(file))
    assert len(halves.bench.workload.requests) == 5
    assert len(Bench(halves._test).workload.requests) == 5


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"trials": 0}, "at least one trial"),
        ({"objective_names": ()}, "at least one objective"),
        ({"objective_names": ("speed",)}, "no objective is called 'speed'"),
        ({"objective_names": ("cost", "cost")}, "named twice"),
        ({"costs": ("paper", "roofline")}, "one cost model at a time"),
    ],
)
def test_a_wrong_configuration_gives_one_sentence(tuning_for: Make, changes: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        tuning_for(**changes)


def test_an_undefined_objective_is_a_failed_trial(tuning_for: Make):
    # goodput without limits to meet
    tuning = tuning_for(objective_names=("goodput",), trials=2)
    with pytest.raises(RunFailed, match=r"goodput .* is undefined"):
        run(tuning)


def test_the_conclusion_writes_presets_that_reproduce_their_held_out_values(tuning_for: Make, tmp_path: Path):
    tuning = tuning_for(trials=8)
    study = run(tuning)
    outcome = conclude(tuning, study, tmp_path)
    written = json.loads((tmp_path / "tuning.json").read_text())
    assert written["points"][0]["name"] == "default"
    assert len(written["trials"]) == 8
    assert set(written["front"]) == {trial.number for trial in tuning.pareto(study)}
    preset = load_preset(tmp_path / "preset.json")
    assert preset.provenance["tuned_on"]["study"] == "s"
    row = next(row for row in outcome.rows if row.name == outcome.recommended)
    cell = apply_preset(Bench(tuning._test), preset).run_cell("roofline", preset.policy).cell
    assert row.held_out == {"latency": cell.layer.mean_ms, "cost": cell.billing.resident}
    assert preset.provenance["held_out"] == row.held_out
    for file in (tmp_path / "presets").iterdir():
        load_preset(file)
