"""A trial is taken from a process that has died, never from one that lives, wherever either of them runs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from moeless.simulator.bench import Bench
from moeless.tuning import Tuning, storage, workers

Make = Callable[..., Tuning]


class Clock:
    """A clock that the test turns."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["journal", "sqlite"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "s.journal") if request.param == "journal" else f"sqlite:///{tmp_path / 's.db'}"


@pytest.fixture
def study(where: str) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(storage=storage.open_storage(where), study_name="s")


def same(study: optuna.Study, where: str) -> optuna.Study:
    """The study as another process opens it."""
    return optuna.load_study(study_name="s", storage=storage.open_storage(where))


def running(study: optuna.Study, **worker: Any) -> optuna.Trial:
    """A trial that a process like this one says to run, but for what is given."""
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.set_user_attr(workers.WORKER, {**workers.identity(), "id": "another", "beats": 0, **worker})
    return trial


def state(study: optuna.Study, trial: optuna.Trial) -> TrialState:
    return study.trials[trial.number].state


@pytest.fixture
def neighbour() -> Iterator[int]:
    """A live process."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        return process.pid


def test_a_dead_process_on_this_machine_is_known_at_once(study: optuna.Study, neighbour: int):
    watch = workers.Watch(study, Clock())
    gone = running(study, pid=ended_process())
    successor = running(study, pid=neighbour, born="1")
    assert watch.reap() == 2
    assert {state(study, gone), state(study, successor)} == {TrialState.FAIL}
    waiting = study.get_trials(states=(TrialState.WAITING,))
    assert [trial.system_attrs["fixed_params"] for trial in waiting] == [gone.params, successor.params]
    assert watch.counted() == 0


def test_a_live_process_on_this_machine_keeps_its_trial_however_long_it_says_nothing(
    study: optuna.Study, neighbour: int
):
    clock = Clock()
    watch = workers.Watch(study, clock)
    trial = running(study, pid=neighbour, born=workers._born(neighbour))
    for _ in range(9):
        assert watch.reap() == 0
        clock.now += workers.GRACE_SECONDS
    assert state(study, trial) == TrialState.RUNNING
    assert watch.counted() == 1
    assert not watch.unsure()


@pytest.mark.parametrize("kernel", ["another boot or namespace", None])
def test_an_equal_host_name_and_process_id_elsewhere_say_nothing(study: optuna.Study, kernel: str | None):
    watch = workers.Watch(study, Clock())
    elsewhere = running(study, pid=2**22 + 1, kernel=kernel)
    namesake = running(study, kernel=kernel)
    assert watch.reap() == 0
    assert {state(study, elsewhere), state(study, namesake)} == {TrialState.RUNNING}


def test_processes_that_the_kernel_hides_are_not_taken_for_dead(
    study: optuna.Study, neighbour: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    trial = running(study, pid=neighbour)
    # with `hidepid` other users' processes have no folder
    monkeypatch.setattr(workers, "_PROC", tmp_path)
    assert workers.Watch(study, Clock()).reap() == 0
    assert state(study, trial) == TrialState.RUNNING


def test_a_process_elsewhere_keeps_its_trial_while_it_counts_and_loses_it_when_it_stops(study: optuna.Study):
    clock = Clock()
    watch = workers.Watch(study, clock)
    trial = running(study, kernel="elsewhere")
    for beats in range(1, 20):
        assert watch.reap() == 0
        assert watch.unsure() == (beats == 1)
        clock.now += workers.BEAT_SECONDS
        trial.set_user_attr(workers.WORKER, {**study.trials[0].user_attrs[workers.WORKER], "beats": beats})
    beats = 0
    while watch.reap() == 0:
        assert watch.counted() == 1
        clock.now += workers.BEAT_SECONDS
        beats += 1
    assert beats == workers.GRACE_SECONDS // workers.BEAT_SECONDS
    assert state(study, trial) == TrialState.FAIL
    assert len(study.get_trials(states=(TrialState.WAITING,))) == 1


@pytest.mark.parametrize("zone", ["Etc/GMT+12", "Etc/GMT-12"])
def test_clocks_and_time_zones_of_machines_do_not_matter(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch, zone: str
):
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TZ", zone)
        time.tzset()
        # nobody has said yet who runs it
        study.ask()
    time.tzset()
    clock = Clock()
    watch = workers.Watch(study, clock)
    assert watch.reap() == 0
    clock.now += workers.GRACE_SECONDS / 2
    assert watch.reap() == 0
    clock.now += workers.GRACE_SECONDS / 2
    assert watch.reap() == 1


def test_a_process_that_slept_itself_gives_others_time_to_count_again(study: optuna.Study):
    clock = Clock()
    watch = workers.Watch(study, clock)
    running(study, kernel="elsewhere")
    assert watch.reap() == 0
    clock.now += 100 * workers.GRACE_SECONDS
    assert watch.reap() == 0


def test_of_two_processes_that_take_a_trial_away_at_once_one_queues_it_again(study: optuna.Study, where: str):
    trial = running(study, pid=2**22 + 1)
    other = same(study, where)
    tell, first = other.tell, workers.Watch(study)

    def late(*args: Any, **more: Any) -> Any:
        assert first.reap() == 1
        return tell(*args, **more)

    other.tell = late  # type: ignore[method-assign]
    assert workers.Watch(other).reap() == 0
    assert state(study, trial) == TrialState.FAIL
    assert len(study.get_trials(states=(TrialState.WAITING,))) == 1


def test_whoever_runs_a_trial_counts_up_where_others_see_it(
    study: optuna.Study, where: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(workers, "BEAT_SECONDS", 0.01)
    other, deadline = same(study, where), time.monotonic() + 60
    trial = study.ask()
    with workers.working(trial):
        while other.trials[0].user_attrs.get(workers.WORKER, {}).get("beats", 0) < 2:
            assert time.monotonic() < deadline
    study.tell(trial, 1.0)
    assert other.trials[0].value == 1.0


def test_a_trial_whose_end_this_process_could_not_write_is_tried_again(study: optuna.Study):
    watch = workers.Watch(study, Clock())
    trial = study.ask()
    with workers.working(trial):
        assert watch.reap() == 0
    assert watch.reap() == 1


def test_a_worker_whose_trial_was_taken_away_goes_on_with_the_next(
    tuning_for: Make, where: str, monkeypatch: pytest.MonkeyPatch
):
    tuning, calls = tuning_for(storage=where), []
    study = tuning.open()
    real = Bench.run_cell

    def slow(self: Bench, *args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            other = same(study, where)
            (lost,) = other.get_trials(states=(TrialState.RUNNING,))
            other.tell(lost.number, state=TrialState.FAIL)
            other.enqueue_trial(lost.params)
        return real(self, *args, **more)

    monkeypatch.setattr(Bench, "run_cell", slow)
    tuning.run(study)
    states = [trial.state for trial in study.trials]
    assert (states.count(TrialState.COMPLETE), states.count(TrialState.FAIL), len(states)) == (6, 1, 7)
    assert study.trials[3].params == study.trials[2].params


def test_a_trial_of_a_process_that_died_elsewhere_does_not_count(tuning_for: Make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.3)
    tuning = tuning_for()
    running(tuning.open(), host="the machine before", kernel="elsewhere")
    study = tuning_for().open()
    told: list[int] = []
    tuning_for().run(study, waiting=lambda: told.append(len(study.get_trials(states=(TrialState.COMPLETE,)))))
    states = [trial.state for trial in study.trials]
    assert (states.count(TrialState.COMPLETE), states.count(TrialState.RUNNING)) == (6, 0)
    # at most one word on why nothing happens
    assert told in ([], [5])
