"""Ranks under ``torchrun``: started by this program on one machine, or by whoever starts all machines.

Either way a rank learns its place from the environment variables that torchrun sets. As a program, this module is
torchrun for ranks of this machine alone: it ends with the command, and needs no host name.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moeless.engine.launch import Report, die_with, raise_failure
from moeless.errors import RunFailed


@dataclass(frozen=True)
class Place:
    """Where a rank stands among all ranks and on its machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place; None where torchrun did not start it."""
    if "TORCHELASTIC_RUN_ID" not in environment or "RANK" not in environment:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, world, local_rank, local_world = (int(environment[name]) for name in names)
    return Place(rank, world, local_rank, local_world)


def report_path(folder: Path, rank: int) -> Path:
    """Where a rank says why it failed."""
    return folder / f"report-{rank}.json"


def failures(folder: Path, errors: str) -> dict[int, tuple[int, Report | None]]:
    """Exit status and report of the ranks that failed, from their reports and from torchrun's own summary.

    Ranks that torchrun ended because another one failed are left out.
    """
    found: dict[int, tuple[int, Report | None]] = {}
    for path in folder.glob("report-*.json"):
        found[int(path.stem.split("-")[1])] = (1, Report(**json.loads(path.read_text(encoding="utf-8"))))
    entries = re.findall(r"rank +: (\d+) \(local_rank: \d+\)\s+exitcode +: (-?\d+)", errors)
    cause = errors.find("Root Cause")
    roots = re.findall(r"rank +: (\d+) \(local_rank", errors[cause:]) if cause >= 0 else []
    for rank, code in entries:
        if int(code) != -signal.SIGTERM or rank in roots:
            found.setdefault(int(rank), (int(code), None))
            if int(code) < 0:
                found[int(rank)] = (int(code), None)
    return found


def end_well_on_sigterm() -> None:
    """Let what was served be kept when torchrun ends this rank because another one failed."""

    def stop(*_: object) -> None:
        raise RunFailed("another rank failed, and torchrun ended this one; its own message names the rank")

    signal.signal(signal.SIGTERM, stop)


def command(job: Path, ranks: int) -> list[str]:
    """The command line that runs a job file's ranks on this machine.

    Ranks meet at a free port of the loopback address: ``--standalone`` would look the host's name up.
    """
    meeting = ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    meeting += [f"--rdzv-id={uuid.uuid4()}", f"--nproc-per-node={ranks}"]
    begin = [sys.executable, "-m", "moeless.engine.torchrun", str(os.getpid())]
    return [*begin, *meeting, "-m", "moeless.engine.worker", str(job)]


def run_torchrun(job: Path, ranks: int) -> None:
    """Run a job file's ranks on this machine under ``torchrun``.

    Raises:
        UserError, RunFailed: a rank refused, failed or was killed; the sentence names it.
    """
    process = subprocess.Popen(command(job, ranks), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.returncode == 0:
        return
    failed = failures(job.parent, errors)
    if not failed:
        last = errors.strip().splitlines()[-1] if errors.strip() else f"exit status {process.returncode}"
        raise RunFailed(f"torchrun failed: {last}")
    raise_failure(failed)


def main(arguments: list[str]) -> None:
    """The program: torchrun, ended with its parent, whose process id comes first."""
    # torchrun ends its ranks when it is told to
    die_with(int(arguments[0]), signal.SIGTERM)
    from torch.distributed.run import main as run

    run(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
