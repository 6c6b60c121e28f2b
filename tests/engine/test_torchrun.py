"""Ranks under torchrun run the same worker; who failed is read from their reports and torchrun's summary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moeless.engine.job import Job
from moeless.engine.launch import raise_failure
from moeless.engine.results import finished_requests, read_records
from moeless.engine.start import launch
from moeless.engine.torchrun import command, failures, place, report_path
from moeless.errors import RunFailed, UserError

SUMMARY = """
Failures:
[1]:
  time      : 2026-01-01_00:00:00
  rank      : {first} (local_rank: {first})
  exitcode  : {first_code} (pid: 100)  (SIGTERM)
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  rank      : {cause} (local_rank: {cause})
  exitcode  : {cause_code} (pid: 101)  (SIGKILL)
"""


def test_two_ranks_under_torchrun_serve_a_job(make_job: Callable[..., Job]) -> None:
    job = make_job(policies=("moeless:history",), copy_from="peer", verify=False)
    launch(job, "torchrun")
    assert [entry["request"] for entry in finished_requests(job.folder, 0, 2)] == [0, 1, 2, 3, 4]
    facts = read_records(job, 0).facts
    assert sum(fact["peer_loads"] for fact in facts) > 0


def test_a_killed_rank_is_named_and_those_that_torchrun_ended_are_not(tmp_path: Path) -> None:
    found = failures(tmp_path, SUMMARY.format(first=0, first_code=-15, cause=1, cause_code=-9))
    assert found == {1: (-9, None)}
    with pytest.raises(RunFailed, match="rank 1 was killed by SIGKILL"):
        raise_failure(found)


def test_a_rank_that_was_told_to_end_first_is_the_cause(tmp_path: Path) -> None:
    found = failures(tmp_path, SUMMARY.format(first=0, first_code=1, cause=1, cause_code=-15))
    with pytest.raises(RunFailed, match="rank 1 was killed by SIGTERM"):
        raise_failure(found)


def test_a_report_says_more_than_an_exit_status(tmp_path: Path) -> None:
    report_path(tmp_path, 1).write_text(json.dumps({"kind": "user", "message": "no such expert"}))
    with pytest.raises(UserError, match=r"^no such expert$"):
        raise_failure(failures(tmp_path, SUMMARY.format(first=0, first_code=-15, cause=1, cause_code=1)))


def test_torchrun_of_one_machine_looks_up_no_host_name_and_takes_no_fixed_port(tmp_path: Path) -> None:
    words = command(tmp_path / "job.json", 4)
    assert "--standalone" not in words
    assert {"--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "--nproc-per-node=4"} <= set(words)
    # two runs on one machine are two meetings
    assert words != command(tmp_path / "job.json", 4)


def test_a_place_is_read_from_torchrun_s_variables() -> None:
    names = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "1"}
    assert place(names) is None
    found = place(names | {"TORCHELASTIC_RUN_ID": "none"})
    assert found is not None
    assert (found.rank, found.world, found.local_rank, found.local_world) == (5, 8, 1, 4)
