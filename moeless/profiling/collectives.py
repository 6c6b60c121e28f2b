"""All-to-all and gather times among ranks of one machine: gloo on CPUs, NCCL on GPUs.

Run as a program of its own, so that ranks are forked from a process that has computed nothing:
``python -m moeless.profiling.collectives RANKS cpu|cuda:N OUT.json [--quick]``; ranks take the GPUs from N on.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moeless.engine import groups
from moeless.engine.interfaces import choose_interface
from moeless.machine import cores
from moeless.profiling.busy import devices_of
from moeless.profiling.monotone import monotone_curve
from moeless.profiling.ranks import run_program
from moeless.profiling.timing import timed_wall

#: Bytes that the fullest rank receives.
SIZES = {
    "cpu": [1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22],
    "cuda": [1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28],
}
TIMEOUT_SECONDS = 240


def measure_exchange(ranks: int, device: str, quick: bool) -> dict[str, Any]:
    """One entry of a profile's ``exchange``, measured by forked ranks.

    Args:
        device: ``cpu``, or ``cuda:N`` for the GPUs from the N-th on.

    Raises:
        RunFailed: the ranks ended without a result.
    """
    with tempfile.TemporaryDirectory(prefix="moeless-ranks-") as folder:
        out = Path(folder) / "exchange.json"
        arguments, what = [str(ranks), device, str(out)], f"the exchange among {ranks} ranks"
        run_program("moeless.profiling.collectives", arguments, out, quick=quick, what=what)
        entry: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return entry


def _slowest(call: Callable[[], object], device: torch.device, repetitions: int) -> np.ndarray:
    """Seconds of each repetition on its slowest rank; ranks start together."""
    seconds = np.zeros(repetitions + 2)
    for i in range(repetitions + 2):
        dist.barrier()
        seconds[i] = timed_wall(call, device)
    shared = torch.tensor(seconds[2:], dtype=torch.float64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.cpu().numpy()


def _rank_main(rank: int, ranks: int, name: str, meeting: groups.Meeting, out: Path, quick: bool) -> None:
    torch.set_num_threads(1)
    device = devices_of(torch.device(name), ranks)[rank]
    kind = device.type
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    choose_interface(one_machine=True)
    dist.init_process_group(
        backend, store=meeting.store(rank, ranks, timeout), rank=rank, world_size=ranks, timeout=timeout
    )
    repetitions = 7 if quick else 25
    sizes = SIZES[kind][:: 2 if quick else 1]
    table: dict[str, list[list[float]]] = {"uniform": [], "hot": []}
    for size in sizes:
        part = max(1, size // (ranks - 1))
        for pattern, samples in table.items():
            to_all = [0 if peer == rank else part for peer in range(ranks)]
            to_first = [part if peer == 0 and rank != 0 else 0 for peer in range(ranks)]
            from_all = [part if rank == 0 and peer != 0 else 0 for peer in range(ranks)]
            give, take = (to_all, to_all) if pattern == "uniform" else (to_first, from_all)
            sent = torch.randint(0, 255, (sum(give),), dtype=torch.uint8, device=device)
            got = torch.empty(sum(take), dtype=torch.uint8, device=device)
            exchange = partial(dist.all_to_all_single, got, sent, take, give)
            seconds = _slowest(exchange, device, repetitions)
            samples.append(np.quantile(seconds, [0.1, 0.5, 0.9]).tolist())
    numbers = torch.zeros(128, dtype=torch.int64, device=device)
    everyone = torch.empty(128 * ranks, dtype=torch.int64, device=device)
    gather = _slowest(lambda: dist.all_gather_into_tensor(everyone, numbers), device, repetitions)
    if rank == 0:
        uniform = monotone_curve(np.array(table["uniform"])[:, 1])
        hot = np.minimum(monotone_curve(np.array(table["hot"])[:, 1]), uniform)
        entry = {
            "ranks": ranks,
            "backend": backend,
            "bytes": [max(1, size // (ranks - 1)) * (ranks - 1) for size in sizes],
            "seconds": uniform.tolist(),
            "hot_seconds": hot.tolist(),
            "low": [row[0] for row in table["uniform"]],
            "high": [row[2] for row in table["uniform"]],
            "gather_seconds": float(np.median(gather)),
            "cores": cores(),
        }
        out.write_text(json.dumps(entry), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def main(arguments: list[str]) -> int:
    """Fork the ranks and wait for them; 0 when all ended well."""
    ranks, device, out = int(arguments[0]), arguments[1], Path(arguments[2])
    torch.set_num_threads(1)
    meeting = groups.Meeting()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _rank_main(rank, ranks, device, meeting, out, "--quick" in arguments)
                status = 0
            except Exception as error:
                sys.stderr.write(f"rank {rank}: {error}\n")
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    failed = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return int(any(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
