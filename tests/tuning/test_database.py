"""Studies in databases: drivers, missing packages, and two processes on a real PostgreSQL server."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from moeless.errors import RunFailed, UserError
from moeless.simulator.bench import Bench
from moeless.tuning import Tuning, database, storage

Make = Callable[..., Tuning]
PASSWORD = "s3cret-of-the-study"


@pytest.mark.parametrize(
    ("url", "missing", "sentence"),
    [
        ("postgresql://me:hush-hush@db/s", ["psycopg", "psycopg2"], r"pip install 'moeless\[postgres\]'"),
        ("postgresql+psycopg2://me:hush-hush@db/s", ["psycopg2"], "pip install psycopg2-binary"),
        ("mysql://me:hush-hush@db/s", ["MySQLdb"], "pip install mysqlclient"),
        ("mysql+pymysql://me:hush-hush@db/s", ["pymysql"], "pip install pymysql"),
        ("nosuch://me:hush-hush@db/s", [], r"no driver of that name .*pip install 'moeless\[postgres\]'"),
        ("postgresql://me:hush-hush@db:port/s", [], r"has the form dialect\[\+driver\]://"),
    ],
)
def test_a_missing_driver_is_named_with_the_package_to_install(
    url: str, missing: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
):
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=sentence) as caught:
        storage.open_storage(url)
    assert str(caught.value).startswith("cannot open the study's storage ")
    assert "hush" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "installed", "driver"),
    [
        ("postgresql://u@h/d", ["psycopg", "psycopg2"], "postgresql+psycopg"),
        ("postgresql://u@h/d", ["psycopg2"], "postgresql+psycopg2"),
        ("postgres://u@h/d", [], "postgresql+psycopg"),
        ("postgresql+psycopg2://u@h/d", ["psycopg"], "postgresql+psycopg2"),
        ("mysql+pymysql://u@h/d", ["psycopg"], "mysql+pymysql"),
    ],
)
def test_a_plain_address_means_the_driver_that_is_installed_and_a_named_one_stays(
    url: str, installed: list[str], driver: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert database._with_driver(url).drivername == driver


def test_tables_that_another_process_makes_at_the_same_moment_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from sqlalchemy.exc import OperationalError

    real, tries = optuna.storages.RDBStorage, []

    def beaten(*args: Any, **more: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise OperationalError("CREATE TABLE studies", {}, Exception("table studies already exists"))
        return real(*args, **more)

    monkeypatch.setattr(optuna.storages, "RDBStorage", beaten)
    monkeypatch.setattr(database, "_PAUSE", 0.0)
    assert storage.open_storage(f"sqlite:///{tmp_path / 's.db'}").get_all_studies() == []
    assert len(tries) == 2


class Server:
    """A PostgreSQL server of its own, reached through a socket in its folder."""

    def __init__(self, programs: Path, folder: Path, options: dict[str, Any]) -> None:
        self._programs, self._options, self.folder = programs, options, folder
        self.url = f"postgresql://moeless:{PASSWORD}@/postgres?host={folder}"

    def run(self, program: str, *arguments: str) -> None:
        """Run one of its programs as the user who owns the folder."""
        command = [str(self._programs / program), "-D", str(self.folder / "data"), *arguments]
        # the server would keep pipes open
        with (self.folder / "log").open("a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, cwd=self.folder, **self._options)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.run("pg_ctl", "-w", "-l", str(self.folder / "server.log"), "-o", f"-k {self.folder} -h '' -F", "start")

    def stop(self) -> None:
        """Stop it as a crash would."""
        self.run("pg_ctl", "-m", "immediate", "stop")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    if not found and not on_path:
        pytest.skip("no PostgreSQL server is installed")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("no PostgreSQL driver is installed: pip install 'moeless[postgres]'")
    programs = (found[-1] if found else Path(str(on_path))).parent
    # the server refuses to run as root; the path of a socket must be short
    folder = Path(tempfile.mkdtemp(prefix="moeless-", dir="/tmp"))
    options: dict[str, Any] = {}
    if os.geteuid() == 0:
        options = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        try:
            shutil.chown(folder, "nobody", "nogroup")
        except LookupError:
            shutil.rmtree(folder)
            pytest.skip("the server cannot run as root, and there is no user nobody")
    made = Server(programs, folder, options)
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    try:
        access = ["-A", "scram-sha-256", f"--pwfile={folder / 'password'}"]
        made.run("initdb", "-U", "moeless", "--no-sync", "--locale=C", "-E", "UTF8", *access)
        made.start()
        yield made
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            made.stop()
        shutil.rmtree(folder)


def test_two_processes_share_a_study_on_postgresql_and_keep_its_password_to_themselves(
    server: Server, trace: Path, tmp_path: Path, tuning_for: Make
):
    # what is compiled here need not be compiled by both
    tuning_for().bench.run_cell("roofline", tuning_for().policy)

    def tune(out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "moeless", "tune", str(trace), "--policy", "moeless:history", "--trials", "6"]
        command += ["--storage", server.url, "--study", "shared", "--arrivals", "poisson:200", "--max-requests", "8"]
        command += ["--no-wandb", "--json", "--out", str(out)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    # both find an empty database
    processes = [tune(tmp_path / name) for name in ("a", "b")]
    for process in processes:
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
        assert PASSWORD not in out + err
        assert len(json.loads(out)["trials"]) >= 6
    study = optuna.load_study(study_name="shared", storage=storage.open_storage(server.url))
    states = [trial.state for trial in study.trials]
    # both may ask for the last trial at the same moment
    assert 6 <= states.count(TrialState.COMPLETE) == len(states) <= 7
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or PASSWORD.encode() not in file.read_bytes()


def test_a_wrong_password_gives_one_sentence_without_it(server: Server):
    with pytest.raises(UserError, match="cannot open the study's storage") as caught:
        storage.open_storage(server.url.replace(PASSWORD, "guessed-wrong"))
    assert "guessed" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_goes_away_ends_the_run_in_one_sentence_and_the_study_goes_on(
    server: Server, tuning_for: Make, monkeypatch: pytest.MonkeyPatch
):
    tuning, calls = tuning_for(storage=server.url, study="again"), []
    study = tuning.open()
    real = Bench.run_cell

    def crash(self: Bench, *args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            server.stop()
        return real(self, *args, **more)

    monkeypatch.setattr(Bench, "run_cell", crash)
    with pytest.raises(RunFailed, match="the same command goes on with the study") as caught:
        tuning.run(study)
    assert PASSWORD not in str(caught.value)
    assert "\n" not in str(caught.value)
    server.start()
    monkeypatch.setattr(Bench, "run_cell", real)
    again = tuning_for(storage=server.url, study="again")
    study = again.open()
    again.run(study)
    states = [trial.state for trial in study.trials]
    assert (states.count(TrialState.COMPLETE), states.count(TrialState.FAIL), len(states)) == (6, 1, 7)
