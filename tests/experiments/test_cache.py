"""Results are kept by content: nothing is computed twice, nothing damaged is believed."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moeless.errors import RunFailed
from moeless.experiments.base import Job
from moeless.experiments.cache import Cache, compute, job_key
from moeless.experiments.runner import run_jobs
from moeless.fingerprint import code_files

MODULE = "jobs_under_test"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.txt"


def _square(x: int, log: Path, needs: tuple[Job, ...] = ()) -> Job:
    return Job(f"square {x}", f"{MODULE}:square", {"x": x, "log": str(log)}, needs)


def _calls(log: Path) -> list[str]:
    return sorted(log.read_text().split()) if log.exists() else []


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_a_second_run_computes_nothing(cache: Cache, log: Path) -> None:
    jobs = {str(x): _square(x, log) for x in (2, 3)}
    first, ran = run_jobs(jobs, cache)
    again, later = run_jobs(jobs, cache)
    assert first == again
    assert first["3"]["value"] == 9
    assert (len(ran.computed), len(later.computed), later.cached) == (2, 0, 2)
    assert _calls(log) == ["2", "3"]


def test_deleting_one_entry_rebuilds_that_one_to_the_same_bytes(cache: Cache, log: Path) -> None:
    jobs = {str(x): _square(x, log) for x in (2, 3, 4)}
    run_jobs(jobs, cache)
    path = cache.entry(jobs["3"])
    before = path.read_bytes()
    path.unlink()
    _, ran = run_jobs(jobs, cache)
    assert len(ran.computed) == 1
    assert path.read_bytes() == before
    assert _calls(log) == ["2", "3", "3", "4"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "other json"])
def test_a_corrupt_entry_is_reported_in_a_sentence_and_made_again(cache: Cache, log: Path, damage: str) -> None:
    job = _square(5, log)
    results, _ = run_jobs({"a": job}, cache)
    path = cache.entry(job)
    text = path.read_text()
    path.write_text(
        {
            "truncate": text[: len(text) // 2],
            "flip": text.replace('"value": 25', '"value": 26'),
            "empty": "",
            "other json": "[1, 2]",
        }[damage]
    )
    again, ran = run_jobs({"a": job}, cache)
    assert again == results
    assert len(ran.computed) == 1
    assert len(cache.problems) == 1
    assert "'square 5' is damaged" in cache.problems[0]


def test_a_job_runs_after_its_needs_and_an_unneeded_need_is_not_rebuilt(cache: Cache, log: Path) -> None:
    need = _square(2, log)
    job = _square(3, log, (need,))
    results, _ = run_jobs({"a": job}, cache)
    assert results["a"]["value"] == 13
    cache.drop(need)
    run_jobs({"a": job}, cache)
    assert _calls(log) == ["2", "3"]


def test_the_key_covers_function_parameters_needs_and_code(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _square(2, log)
    keys = {
        job_key(job),
        job_key(dataclasses.replace(job, params={"x": 3, "log": str(log)})),
        job_key(dataclasses.replace(job, function=f"{MODULE}:read")),
        job_key(dataclasses.replace(job, needs=(_square(9, log),))),
    }
    monkeypatch.setattr("moeless.experiments.cache.code_hash", lambda: "other code")
    keys.add(job_key(job))
    assert len(keys) == 5
    assert job_key(dataclasses.replace(job, label="another name")) == job_key(job)


def test_the_code_hash_covers_what_computes_and_nothing_that_draws() -> None:
    names = {"/".join(path.parts[-2:]) for path in code_files()}
    assert {"placement/static.py", "predictors/base.py", "simulator/simulation.py", "cells/routing.py"} <= names
    assert not {"report/style.py", "cli/main.py", "experiments/systems.py", "tracking/run.py"} & names


def test_artefacts_are_folders_that_appear_whole_and_are_checked(cache: Cache) -> None:
    artefact = Job("fill", f"{MODULE}:fill", {"x": 7}, artefact=True)
    job = Job("read", f"{MODULE}:read", {}, (artefact,))
    results, _ = run_jobs({"a": job, "folder": artefact}, cache)
    assert results["a"] == "7"
    assert sorted(path.name for path in results["folder"].rglob("*.txt")) == ["a.txt", "b.txt"]
    (results["folder"] / "a.txt").write_text("8")
    cache.drop(job)
    again, _ = run_jobs({"a": job}, cache)
    assert again["a"] == "7"
    assert "its files have changed" in cache.problems[0]


def test_parallel_runs_give_the_bytes_of_serial_ones(tmp_path: Path, log: Path) -> None:
    jobs = {str(x): _square(x, log, (_square(x + 100, log),)) for x in range(3)}
    serial, parallel = Cache(tmp_path / "serial"), Cache(tmp_path / "parallel")
    assert run_jobs(jobs, serial)[0] == run_jobs(jobs, parallel, workers=2)[0]
    for job in jobs.values():
        assert serial.entry(job).read_bytes() == parallel.entry(job).read_bytes()


def test_an_interrupt_keeps_what_was_finished(cache: Cache, log: Path) -> None:
    jobs = {"a": _square(2, log), "b": Job("interrupt", f"{MODULE}:interrupt"), "c": _square(4, log)}
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, cache)
    jobs.pop("b")
    _, ran = run_jobs(jobs, cache)
    assert (ran.cached, len(ran.computed)) == (1, 1)


def test_a_dead_worker_ends_in_a_sentence(cache: Cache, log: Path) -> None:
    jobs = {"a": Job("die", f"{MODULE}:die"), "b": _square(2, log)}
    with pytest.raises(RunFailed, match="a worker process died"):
        run_jobs(jobs, cache, workers=2)


def test_a_killed_run_keeps_what_was_finished_and_leaves_no_worker_behind(tmp_path: Path, log: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    program = f"""
from pathlib import Path
from moeless.experiments.base import Job
from moeless.experiments.cache import Cache
from moeless.experiments.runner import run_jobs
if __name__ == "__main__":
    jobs = {{
        "a": Job("square", "jobs_under_test:square", {{"x": 2, "log": {str(log)!r}}}),
        "b": Job("park", "jobs_under_test:park", {{"pipe": {str(pipe)!r}}}),
    }}
    run_jobs(jobs, Cache(Path({str(tmp_path / "cache")!r})))
"""
    (tmp_path / "program.py").write_text(program)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        run = subprocess.Popen([sys.executable, str(tmp_path / "program.py")])
        wait_for_word(reader, run)
        run.kill()
        run.wait()
        # the end of the pipe is the end of the worker, which held it open
        select.select([reader], [], [], PATIENCE)
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)
    _, ran = run_jobs({"a": _square(2, log)}, Cache(tmp_path / "cache"))
    assert ran.cached == 1


#: Seconds after which a test gives up on an event; no machine is that slow.
PATIENCE = 900.0


def wait_for_word(reader: int, writer: subprocess.Popen[bytes]) -> None:
    """Wait until a worker of ``writer`` has written to the pipe; fail at once where ``writer`` ended before."""
    ended = os.pidfd_open(writer.pid)
    try:
        waiting = select.poll()
        waiting.register(reader, select.POLLIN)
        waiting.register(ended, select.POLLIN)
        ready = {handle for handle, event in waiting.poll(PATIENCE * 1e3) if event & select.POLLIN}
        assert reader in ready
        assert os.read(reader, 4) == b"here"
    finally:
        os.close(ended)


def test_two_runs_that_share_a_cache_end_with_one_result_each_can_use(tmp_path: Path) -> None:
    (tmp_path / "met").mkdir()
    artefact = Job("fill", f"{MODULE}:fill_together", {"x": 7, "met": str(tmp_path / "met")}, artefact=True)
    job = Job("read", f"{MODULE}:read", {}, (artefact,))
    caches = [Cache(tmp_path / "cache") for _ in range(2)]
    with ThreadPoolExecutor(2) as runs:
        ended = [runs.submit(run_jobs, {"a": job, "folder": artefact}, cache) for cache in caches]
        results = [one.result(PATIENCE)[0] for one in ended]
    assert results[0] == results[1]
    assert results[0]["a"] == "7"
    assert [cache.problems for cache in caches] == [[], []]
    # nothing is left of the folder that came second
    assert {path.suffix for path in results[0]["folder"].parent.iterdir()} == {"", ".json"}
    assert len(list(results[0]["folder"].parent.iterdir())) == 2


def test_an_artefact_that_another_run_finished_meanwhile_stays_in_its_place(cache: Cache) -> None:
    artefact = Job("fill", f"{MODULE}:fill", {"x": 7}, artefact=True)
    run_jobs({"a": artefact}, cache)
    folder, entry = cache.folder(artefact), cache.entry(artefact)
    before = (folder.stat().st_ino, entry.stat().st_ino)
    # this run had seen no entry when it began
    compute(artefact, [], folder)
    cache.write(artefact, None)
    assert (folder.stat().st_ino, entry.stat().st_ino) == before
    # a folder that no entry vouches for counts only if it holds what was made
    entry.unlink()
    compute(artefact, [], folder)
    assert folder.stat().st_ino == before[0]
    (folder / "a.txt").unlink()
    compute(artefact, [], folder)
    assert (folder / "a.txt").read_text() == "7"


def test_a_timed_result_kept_first_is_the_one_that_all_runs_show(cache: Cache) -> None:
    job = Job("clock", f"{MODULE}:square", {"x": 1}, timed=True)
    cache.write(job, {"seconds": 1.0})
    cache.write(job, {"seconds": 2.0})
    assert cache.read(job) == {"seconds": 1.0}


def test_wall_clock_times_are_kept_by_machine_and_nothing_else_is(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _square(2, log)
    timed = dataclasses.replace(job, timed=True)
    before = job_key(job), job_key(timed)
    monkeypatch.setattr("moeless.experiments.cache.machine", lambda: {"cpu": "another", "cores": 64})
    assert job_key(job) == before[0]
    assert job_key(timed) != before[1]


def test_a_full_disk_ends_in_a_sentence_and_a_resumable_state(tmp_path: Path, log: Path) -> None:
    """A file-size limit stands for the full disk: the kernel refuses the write in the same way."""
    program = f"""
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from moeless.experiments.base import Job
from moeless.experiments.cache import Cache
from moeless.experiments.runner import run_jobs
from moeless.tracking import start_run
from moeless.errors import RunFailed
cache = Cache(Path({str(tmp_path / "cache")!r}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
small = Job("small", "jobs_under_test:square", {{"x": 2, "log": {str(log)!r}}})
huge = Job("huge", "jobs_under_test:huge")
try:
    with start_run("reproduce", "x", {{}}, 0, out=Path({str(tmp_path / "run")!r}), wandb=False) as run:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        run_jobs({{"small": small, "huge": huge}}, cache)
except RunFailed as error:
    print("sentence:", error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert "sentence: the disk is full; what was written so far is kept in" in done.stdout, done.stderr
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"
    leftovers = [path for path in (tmp_path / "cache").rglob("*") if "partial" in path.name]
    assert leftovers == []
    _, ran = run_jobs({"small": _square(2, log)}, Cache(tmp_path / "cache"))
    assert ran.cached == 1
