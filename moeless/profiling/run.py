"""One model's hardware profile, measured here."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moeless import __version__
from moeless.allocator import keep_freed_memory
from moeless.costs.profile_reader import FORMAT, KIND, parse_profile
from moeless.credentials import command_line
from moeless.errors import UserError
from moeless.machine import cores, memory_bytes, processor_name
from moeless.profiling.busy import check_idle, devices_of, resolve_device
from moeless.profiling.ceilings import cache_bytes, measure_ceilings
from moeless.profiling.collectives import measure_exchange
from moeless.profiling.control import measure_control
from moeless.profiling.copies import describe_storage, measure_copies, measure_overlap
from moeless.profiling.experts import kernels_for, measure_experts
from moeless.profiling.layers import beyond_parts, layer_fits, measure_layers
from moeless.profiling.parts import measure_parts
from moeless.profiling.timing import QUICK, Effort
from moeless.spec import MoESpec

TOKENS_CUDA = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
TOKENS_CPU = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
ACTIVE_CUDA = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40)
ACTIVE_CPU = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
#: Times that a grid is gone through: other work comes and goes on a CPU.
PASSES = {"cpu": 3, "cuda": 1}
QUICK_TOKENS = (1, 4, 16, 64, 256)
QUICK_ACTIVE = (1, 2, 4)
COPY_SIZES = {
    "cuda": [1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28],
    "cpu": [1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26],
}
#: Types that torch computes experts in; experts stored otherwise are timed in the first of a device's.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Weights of the expert pool may take this share of a GPU's memory, or these bytes of a host's.
POOL_SHARE = 0.35
POOL_BYTES_CPU = 2**30


@dataclass(frozen=True)
class ProfileOptions:
    """What to measure.

    Attributes:
        ranks: measure all-to-alls among 2, 4, ... up to this many ranks; 1 measures none.
        dtypes: types of the expert grids, the first one is the profile's default; None picks by device.
        threads: CPU threads of one rank.
        links: link model to name where no exchange is measured, None for none.
        quick: small grids and few repetitions.
    """

    ranks: int = 1
    dtypes: tuple[str, ...] | None = None
    threads: int = 1
    links: str | None = None
    quick: bool = False
    force: bool = False


@dataclass(frozen=True)
class Plan:
    """Resolved measurement: grids, how often they are gone through, and their cost, for ``--dry-run`` and the run."""

    device: torch.device
    dtypes: tuple[str, ...]
    tokens: tuple[int, ...]
    active: tuple[int, ...]
    effort: Effort
    copies: tuple[int, ...]
    ranks: tuple[int, ...]
    peak_bytes: float
    seconds: float
    passes: int = 1

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "device": str(self.device),
            "dtypes": list(self.dtypes),
            "tokens_per_expert": list(self.tokens),
            "active_experts": list(self.active),
            "copies_bytes": list(self.copies),
            "exchange_ranks": list(self.ranks),
            "peak_device_bytes": self.peak_bytes,
            "estimated_seconds": self.seconds,
        }


def make_plan(spec: MoESpec, device_name: str, options: ProfileOptions) -> Plan:
    """Resolve the options against the device.

    Raises:
        UserError: no such device or type, or the model's experts do not fit.
    """
    device = resolve_device(device_name)
    cuda = device.type == "cuda"
    dtypes = options.dtypes or (("bfloat16",) if cuda else ("float32",))
    for name in dtypes:
        if name not in DTYPES:
            raise UserError(f"--dtype {name} is not one that experts are timed in; there are: {', '.join(DTYPES)}")
    if options.ranks < 1 or options.threads < 1:
        raise UserError("--ranks and --threads must be at least 1")
    devices_of(device, options.ranks)
    value = max(torch.empty(0, dtype=DTYPES[name]).element_size() for name in dtypes)
    room = torch.cuda.mem_get_info(device)[0] * POOL_SHARE if cuda else POOL_BYTES_CPU
    fit = int(room // (spec.expert_params * value))
    if fit < 1:
        raise UserError(f"one expert of {spec.name} needs {spec.expert_params * value / 2**30:.1f} GiB, too much here")
    active: tuple[int, ...] = QUICK_ACTIVE if options.quick else ACTIVE_CUDA if cuda else ACTIVE_CPU
    tokens: tuple[int, ...] = QUICK_TOKENS if options.quick else TOKENS_CUDA if cuda else TOKENS_CPU
    active = tuple(count for count in active if count <= min(fit, spec.num_experts))
    effort = QUICK if options.quick else Effort(0.03, 7, 50) if cuda else Effort(0.1, 7, 60)
    ranks = tuple(count for count in (2, 4, 8, 16, 32) if count <= options.ranks)
    if options.ranks > 1 and options.ranks not in ranks:
        ranks = (*ranks, options.ranks)
    rows = max(tokens) * max(active)
    row_values = 2 * spec.hidden_size + 4 * spec.expert_intermediate_size
    peak = (max(active) * spec.expert_params + rows * row_values) * value
    flops = spec.expert_flops * sum(tokens) * sum(active) * effort.least * len(dtypes)
    cells = len(tokens) * len(active) * len(dtypes) * (1 if cuda else 2)
    guess = cells * effort.budget * 1.2 + flops / (5e14 if cuda else 3e10) + 25 * len(ranks) + 10
    sizes = COPY_SIZES[device.type][::2] if options.quick else COPY_SIZES[device.type]
    passes = 1 if options.quick else PASSES[device.type]
    return Plan(device, tuple(dtypes), tokens, active, effort, tuple(sizes), ranks, float(peak), float(guess), passes)


def profile_model(
    spec: MoESpec,
    plan: Plan,
    options: ProfileOptions,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure and return a profile's JSON, checked as a reader will check it.

    Args:
        folder: where the disk measurement may write a temporary file.

    Raises:
        RunFailed: the device is busy and ``options.force`` is not set, or ranks failed.
    """
    device, effort = plan.device, plan.effort
    findings = check_idle(device, options.force, options.ranks)
    load_before = os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    exchange = []
    for count in plan.ranks:
        progress(f"exchange among {count} ranks")
        exchange.append(measure_exchange(count, str(device), options.quick))
    layers = {}
    for count in plan.ranks:
        # more ranks than cores take turns: their wall time is no layer's
        if device.type == "cpu" and count <= cores() and layer_fits(spec):
            progress(f"the engine's layer among {count} ranks")
            layers[count] = measure_layers(spec, count, options.quick)
    with torch.no_grad():
        document = _measure(spec, plan, options, folder, progress, exchange, findings, load_before, effort)
    for entry in exchange:
        if entry["ranks"] in layers:
            entry["engine"] = beyond_parts(document, spec, layers[entry["ranks"]])
    parse_profile(document, "just measured")
    return document


def _measure(
    spec: MoESpec,
    plan: Plan,
    options: ProfileOptions,
    folder: Path,
    progress: Callable[[str], None],
    exchange: list[dict[str, Any]],
    findings: list[str],
    load_before: float,
    effort: Effort,
) -> dict[str, Any]:
    device = plan.device
    cache = cache_bytes(device)
    dtypes = [DTYPES[name] for name in plan.dtypes]
    progress("ceilings")
    ceilings = measure_ceilings(device, dtypes, effort)
    grids = []
    measure_grid = partial(
        measure_experts, spec, device=device, tokens=plan.tokens, cache=cache, effort=effort, progress=progress
    )
    for dtype in dtypes:
        kernels = kernels_for(device, dtype)
        # on CUDA a loop over experts is what a grid of single experts says already
        for kernel in kernels if device.type == "cpu" else kernels[:1]:
            grids.append(measure_grid(kernel, dtype=dtype, active=plan.active, passes=plan.passes))
        if device.type == "cuda" and kernels[0] != "loop":
            grids.append(measure_grid("loop", dtype=dtype, active=(1,)))
    progress("router, attention, permute, combine")
    parts = measure_parts(spec, dtypes[0], device, plan.tokens, cache, effort)
    progress("copies")
    # a GPU that nobody named is not touched
    peer = devices_of(device, 2)[1] if device.type == "cuda" and options.ranks > 1 else None
    copies = measure_copies(device, plan.copies, folder, effort, peer)
    overlap = measure_overlap(device, dtypes[0], max(plan.copies))
    return {
        "format": FORMAT,
        "kind": KIND,
        "name": f"{device.type}-{spec.name}",
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "program": {
            "command": command_line(Path(sys.argv[0]).name, sys.argv[1:]),
            "moeless": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "quick": options.quick,
        },
        "machine": describe_machine(device, options.threads)
        | {"load_before": load_before, "load_after": os.getloadavg()[0], "busy": findings}
        | {"storage": describe_storage(folder)},
        "model": {
            "name": spec.name,
            "hidden_size": spec.hidden_size,
            "expert_intermediate_size": spec.expert_intermediate_size,
            "expert_matrices": spec.expert_matrices,
            "num_experts": spec.num_experts,
            "top_k": spec.top_k,
        },
        "ceilings": ceilings.to_json(),
        "default_kernel": default_kernel(grids, plan.dtypes[0]),
        "default_dtype": plan.dtypes[0],
        "experts": grids,
        "parts": parts,
        "copies": copies,
        "overlap": overlap,
        "exchange": exchange,
        "links": None if exchange else options.links,
        "control": measure_control(spec),
    }


def default_kernel(grids: list[dict[str, Any]], dtype: str) -> str:
    """The kernel that the engine runs: grouped products where they were measured, else the loop."""
    kernels = [str(grid["kernel"]) for grid in grids if grid["dtype"] == dtype]
    return "grouped_mm" if "grouped_mm" in kernels else kernels[0]


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """What the device is."""
    common = {"device": device.type, "host_cores": cores(), "threads": threads}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return common | {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "cache_bytes": cache_bytes(device),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return common | {
        "name": processor_name(),
        "memory_bytes": memory_bytes(),
        "cache_bytes": cache_bytes(device),
    }
