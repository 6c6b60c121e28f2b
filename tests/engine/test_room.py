"""What a live run needs is compared with what there is before ranks start; nobody ends by a signal for want of room."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeless.costs import profile
from moeless.engine import bench, room
from moeless.engine.bench import LiveBench, LiveConfig
from moeless.engine.job import Job
from moeless.engine.results import read_records
from moeless.errors import RunFailed, UserError

GB = 10**9
NEEDS = room.Needs(experts=4 * GB, memory=3 * GB, ranks=2, scratch=GB)
SPACE = room.Space(
    memory=16 * GB, shared=Path("/dev/shm"), shared_free=8 * GB, scratch=Path("/tmp"), scratch_free=20 * GB
)


def with_space(**changes: object) -> room.Space:
    return dataclasses.replace(SPACE, **changes)  # type: ignore[arg-type]


def test_experts_lie_in_the_memory_file_system_where_it_has_room() -> None:
    assert room.place(NEEDS, SPACE) == (Path("/dev/shm"), None)


def test_a_small_memory_file_system_is_warned_of_with_both_figures() -> None:
    folder, warning = room.place(NEEDS, with_space(shared_free=64 * 2**20))
    assert folder == Path("/tmp")
    assert warning is not None
    for part in ("/dev/shm has 67 MB free", "need 4.0 GB", "lie in /tmp", "--shm-size 4g"):
        assert part in warning


def test_where_there_is_no_memory_file_system_the_temporary_folder_needs_no_warning() -> None:
    assert room.place(NEEDS, with_space(shared=None, shared_free=0)) == (Path("/tmp"), None)


def test_files_in_a_memory_file_system_count_as_memory_and_those_on_a_disk_do_not() -> None:
    # 3 GB of the ranks, 4 GB of experts, 5 GB of memory
    folder, warning = room.place(NEEDS, with_space(memory=5 * GB))
    assert folder == Path("/tmp")
    assert warning is not None
    assert "5.0 GB of memory" in warning
    with pytest.raises(
        UserError, match=r"2 ranks need about 7.0 GB of memory.* 5.0 GB are available: use fewer --ranks"
    ):
        room.place(NEEDS, with_space(memory=5 * GB, scratch_in_memory=True))
    with pytest.raises(UserError, match=r"about 7.0 GB of memory"):
        room.place(NEEDS, with_space(memory=5 * GB, shared_free=0, scratch_in_memory=True))


def test_no_room_anywhere_is_one_sentence_with_figures_and_ways_out() -> None:
    with pytest.raises(UserError) as refused:
        room.place(NEEDS, with_space(shared_free=64 * 2**20, scratch_free=2 * GB))
    for part in ("4.0 GB", "/dev/shm has 67 MB", "/tmp has 2.0 GB", "--shm-size 4g", "TMPDIR", room.VARIABLE):
        assert part in str(refused.value)
    with pytest.raises(UserError, match=r"2 ranks need about 3.0 GB of memory; 2.0 GB are available"):
        room.place(NEEDS, with_space(shared_free=0, memory=2 * GB))
    with pytest.raises(UserError, match=r"records need 1.0 GB in /tmp, which has 500 MB free; let TMPDIR"):
        room.place(NEEDS, with_space(scratch_free=500 * 10**6))


def test_a_folder_may_be_named_in_place_of_the_memory_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(room.VARIABLE, str(tmp_path))
    assert room.look().shared == tmp_path
    monkeypatch.setenv(room.VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(UserError, match="absent, which is not a folder"):
        room.look()


def small_config(**changes: object) -> LiveConfig:
    small = {
        "policies": ("static",),
        "predict": False,
        "max_requests": 2,
        "prompt_tokens": 8,
        "output_tokens": 2,
        "device": "cpu",
    }
    return LiveConfig(**(small | changes))


def test_needs_grow_with_the_ranks_and_with_what_is_verified() -> None:
    two, four = (LiveBench(small_config(ranks=ranks)).needs() for ranks in (2, 4))
    torchrun = LiveBench(small_config(launcher="torchrun")).needs()
    checked = LiveBench(small_config(verify=True)).needs()
    assert two.experts == four.experts > 0
    assert torchrun.memory > four.memory > two.memory
    assert checked.memory >= two.memory
    assert checked.scratch > two.scratch == 0


def test_a_run_without_room_is_refused_before_any_rank_starts(
    monkeypatch: pytest.MonkeyPatch, cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    started: list[object] = []
    monkeypatch.setattr(bench, "launch", lambda *args: started.append(args))
    monkeypatch.setattr(room, "look", lambda: with_space(memory=10**8))
    status, _, said = cli("serve-bench", "--backend", "live", "--max-requests", "2", "--out", tmp_path / "out")
    assert status == 2
    assert "ranks need about" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    assert started == []


def test_a_live_run_goes_on_in_the_temporary_folder_and_says_whose_times_it_plans_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "processor_name", lambda: "Another 9000")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    looked = room.look()
    small = dataclasses.replace(looked, shared=Path("/dev/shm"), shared_free=64 * 2**10, scratch=scratch)
    monkeypatch.setattr(room, "look", lambda: small)
    run = LiveBench(small_config(verify=True))
    assert run.shared == scratch
    assert len(run.remarks) == 1
    assert "/dev/shm has 66 kB free" in run.remarks[0]
    (cell,) = run.run(tmp_path / "out")
    assert cell.settings["verification"]["passed"]
    assert any("this machine has Another 9000" in warning for warning in cell.warnings)
    # the experts' file has lost its name
    assert list(scratch.iterdir()) == []


#: Prints what becomes of an experts' file of 1 MB in the folder that is given.
RESERVING = """
import sys
from pathlib import Path
import torch
from moeless.engine.exchange import Exchange
from moeless.engine.groups import Ranks
from moeless.engine.hostmem import shared_experts
from moeless.errors import RunFailed
folder = Path(sys.argv[1])
exchange = Exchange(Ranks(0, 1, torch.device("cpu"), None, None, 0, 1))
try:
    experts = shared_experts(folder, 2, 8, {"up": (128, 128)}, torch.float32, exchange)
    for layer in range(2):
        for expert in range(8):
            experts.fill(layer, expert, {"up": torch.ones(128, 128)})
    print("filled")
except RunFailed as failure:
    print(failure)
print(len(list(folder.iterdir())), "files")
"""


@pytest.mark.parametrize(("size", "said"), [("4m", "filled"), ("256k", "the experts' 1 MB found no room in")])
def test_a_full_memory_file_system_is_a_sentence_never_a_signal(tmp_path: Path, size: str, said: str) -> None:
    mount = f"mount -t tmpfs -o size={size} none {tmp_path}"
    unshare = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    try:
        mounts = subprocess.run([*unshare, "sh", "-c", mount], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounts = False
    if not mounts:
        pytest.skip("a small file system cannot be mounted here")
    script = [*unshare, "sh", "-c", f'{mount} && exec "$0" -c "$1" {tmp_path}', sys.executable, RESERVING]
    ended = subprocess.run(script, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(said)
    assert ended.stdout.endswith("0 files\n")


def test_a_folder_that_does_not_take_the_file_ends_the_ranks_with_a_sentence(
    make_job: Callable[..., Job], serve: Callable[[Job], None]
) -> None:
    job = make_job(shared=Path("/proc/self/nowhere"))
    with pytest.raises(RunFailed, match=r"rank 0 failed: the experts' file cannot be made in /proc/self/nowhere"):
        serve(job)


def test_ranks_know_their_machine_and_leave_nothing_in_the_shared_folder(
    make_job: Callable[..., Job], serve: Callable[[Job], None], tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    job = make_job(shared=shared, policies=("eplb:history",), copy_from="host", replan_seconds=1e-6, verify=False)
    serve(job)
    assert list(shared.iterdir()) == []
    facts = read_records(job, 0).facts
    assert {fact["machine"] for fact in facts} == {0}
    assert torch.tensor([fact["shared_bytes"] for fact in facts]).unique().numel() == 1
