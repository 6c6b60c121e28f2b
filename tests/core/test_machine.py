"""Limits of containers are read from their control groups, as both versions of the kernel's interface give them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moeless import machine

GIB = 2**30
Tree = Callable[[dict[str, str]], tuple[Path, Path]]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Write files below made-up ``proc`` and ``cgroup`` folders and return both."""

    def write(files: dict[str, str]) -> tuple[Path, Path]:
        for name, text in {"proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n", **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "cgroup").mkdir(exist_ok=True)
        return tmp_path / "proc", tmp_path / "cgroup"

    return write


def test_version_2_limits_of_all_groups_above_hold(tree: Tree) -> None:
    proc, cgroups = tree(
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "cgroup/cgroup.controllers": "cpu memory\n",
            "cgroup/pod/cpu.max": "250000 100000\n",
            "cgroup/pod/box/cpu.max": "max 100000\n",
            "cgroup/pod/memory.max": "max\n",
            "cgroup/pod/box/memory.max": f"{4 * GIB}\n",
            "cgroup/pod/box/memory.current": f"{3 * GIB}\n",
            "cgroup/pod/box/memory.stat": f"anon 1\ninactive_file {GIB}\n",
        }
    )
    assert machine.processor_quota(proc, cgroups) == 2.5
    assert machine.memory_bytes(proc, cgroups) == 4 * GIB
    # cached file pages are given back when they are needed
    assert machine.available_bytes(proc, cgroups) == 2 * GIB


def test_version_1_limits_are_found_where_a_container_sees_its_group_as_the_root(tree: Tree) -> None:
    proc, cgroups = tree(
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
            "cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
            "cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            "cgroup/memory/memory.stat": "total_inactive_file 0\n",
        }
    )
    assert machine.processor_quota(proc, cgroups) == 0.5
    assert machine.memory_bytes(proc, cgroups) == 2 * GIB
    assert machine.available_bytes(proc, cgroups) == GIB


def test_without_limits_the_machine_is_the_limit(tree: Tree) -> None:
    proc, cgroups = tree(
        {
            "proc/self/cgroup": "4:memory:/\n3:cpu:/\n0::/\n",
            "cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        }
    )
    assert machine.processor_quota(proc, cgroups) is None
    assert machine.memory_bytes(proc, cgroups) == 16 * GIB
    assert machine.available_bytes(proc, cgroups) == 8 * GIB


@pytest.mark.parametrize(("affinity", "quota", "cores"), [(8, None, 8), (8, 2.5, 2), (2, 6.0, 2), (4, 0.5, 1)])
def test_cores_are_those_that_the_quota_leaves(
    monkeypatch: pytest.MonkeyPatch, affinity: int, quota: float | None, cores: int
) -> None:
    monkeypatch.setattr(machine, "affinity", lambda: affinity)
    monkeypatch.setattr(machine, "processor_quota", lambda: quota)
    machine.cores.cache_clear()
    try:
        assert machine.cores() == cores
        environment = {"MKL_NUM_THREADS": "3"}
        machine.limit_threads(environment)
    finally:
        machine.cores.cache_clear()
    assert environment["MKL_NUM_THREADS"] == "3"
    assert environment.get("OMP_NUM_THREADS") == (str(cores) if cores < affinity else None)


def test_the_file_system_of_a_path_is_that_of_the_nearest_mount_above_it(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "23 22 0:40 / /made/home rw - autofs systemd-1 rw\n"
        "24 23 0:41 / /made/home rw - nfs4 server:/export rw\n"
        "25 22 0:42 / /made/my\\040disk rw master:2 - fuse.sshfs host: rw\n"
    )
    assert machine.file_system(Path("/made/home/me/studies.journal"), tmp_path) == "nfs4"
    assert machine.file_system(Path("/made/homes/studies.journal"), tmp_path) == "ext4"
    assert machine.file_system(Path("/made/my disk"), tmp_path) == "fuse.sshfs"
    assert machine.file_system(Path("/made"), tmp_path / "nowhere") == ""
