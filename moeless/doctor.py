"""Checks of the machine and the installation, each with one finding that a person can act on."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from moeless import jit
from moeless.machine import affinity, cores, memory_bytes, processor_quota
from moeless.tracking.wandb import choose_mode

State = Literal["ok", "note", "bad"]

REQUIRED = (
    "torch",
    "transformers",
    "datasets",
    "optuna",
    "wandb",
    "numpy",
    "scipy",
    "numba",
    "pyarrow",
    "safetensors",
    "typer",
    "rich",
    "jinja2",
    "matplotlib",
)
ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Check:
    """One finding: ``bad`` stops something that moeless needs, ``note`` is worth knowing."""

    name: str
    state: State
    finding: str

    def to_json(self) -> dict[str, str]:
        """A dictionary of its three fields."""
        return asdict(self)


def _python() -> Check:
    good = sys.version_info >= (3, 11)
    return Check("python", "ok" if good else "bad", f"{platform.python_version()}" + ("" if good else ", needs 3.11"))


def _package(name: str) -> Check:
    try:
        return Check(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, "bad", f"not installed: pip install {name}")


def _megatron() -> Check:
    from moeless.engine.hosts.megatron_release import remark

    found, untested = _package("megatron-core"), remark()
    return found if untested is None else Check(found.name, "note", untested)


def _machine() -> Check:
    memory = memory_bytes() / 2**30
    usable, quota = cores(), processor_quota()
    state: State = "ok" if memory >= 8 and usable >= 2 else "note"
    limited = f" (a quota of {quota:g} of {affinity()})" if quota is not None and quota < affinity() else ""
    found = f"{usable} cores{limited}, {memory:.{0 if memory >= 10 else 1}f} GiB memory"
    return Check("machine", state, f"{found}, load {os.getloadavg()[0]:.1f}")


def _devices() -> Check:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check("devices", "ok", f"{len(names)} GPU: {', '.join(sorted(set(names)))}")
    return Check("devices", "note", "no GPU: ranks run on CPU over gloo, times there say nothing about GPUs")


def _collectives() -> Check:
    import torch.distributed as dist

    if not dist.is_available():
        return Check("collectives", "bad", "this torch was built without torch.distributed")
    found = [n for n, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there]
    return Check("collectives", "ok" if found else "bad", ", ".join(found) or "neither gloo nor NCCL")


def _grouped() -> Check:
    import torch

    if hasattr(torch.nn.functional, "grouped_mm"):
        return Check("grouped_mm", "ok", "torch.nn.functional.grouped_mm is there")
    return Check("grouped_mm", "note", "this torch has no grouped_mm: experts are computed in a loop")


def _model() -> Check:
    from transformers import AutoConfig

    folder = ASSETS / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        return Check("bundled model", "bad", "moeless/assets/model/model.safetensors is missing: reinstall moeless")
    kind = AutoConfig.from_pretrained(str(folder)).model_type
    return Check("bundled model", "ok", f"{kind}, {weights.stat().st_size / 1e6:.1f} MB")


def _results() -> Check:
    folder = Path("results/runs")
    probe = folder if folder.is_dir() else Path()
    try:
        handle, name = tempfile.mkstemp(dir=probe)
    except OSError as error:
        return Check("run folders", "note", f"{probe.absolute()} is not writable ({error.strerror}): give --out")
    os.close(handle)
    Path(name).unlink()
    return Check("run folders", "ok", f"./{folder}, {shutil.disk_usage(probe).free / 2**30:.0f} GiB free")


def _compiled() -> Check:
    kept = jit.compiled_cache()
    if not jit.COMPILED:
        return Check("compiled functions", "note", "numba is not installed: planners and simulator run in plain Python")
    if kept.path is None:
        return Check("compiled functions", "note", "no folder can be written: they are compiled anew in every run")
    return Check("compiled functions", "ok", f"{kept.path}, {kept.bytes / 1e6:.1f} MB in {kept.files} files")


def _wandb() -> Check:
    found = {
        "online": "logged in: runs are mirrored online",
        "offline": "not logged in, or told to stay offline: runs stay offline",
        "disabled": "disabled by W&B's own settings: runs are not mirrored",
    }
    return Check("W&B", "ok", found[choose_mode(None)])


def _generate() -> Check:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(ASSETS / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(folder)("Question: What is", return_tensors="pt")
    made = model.generate(**tokens, max_new_tokens=4, do_sample=False)
    return Check("generation", "ok", f"{made.shape[1] - tokens['input_ids'].shape[1]} tokens generated")


def _attempt(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # a check that breaks is itself the finding
        return Check(name, "bad", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def examine(deep: bool = False) -> list[Check]:
    """Run every check; none of them raises."""
    checks: list[Check] = [_python(), *(_package(name) for name in REQUIRED)]
    rest: list[tuple[str, Any]] = [
        ("megatron-core", _megatron),
        ("machine", _machine),
        ("devices", _devices),
        ("collectives", _collectives),
        ("grouped_mm", _grouped),
        ("bundled model", _model),
        ("run folders", _results),
        ("compiled functions", _compiled),
        ("W&B", _wandb),
    ]
    if deep:
        rest.append(("generation", _generate))
    return checks + [_attempt(name, check) for name, check in rest]
