"""Where a run ran: revision, versions, hardware. Nothing here imports a heavy library or uses the network."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import moeless
from moeless.errors import UserError
from moeless.files import reading, sha256
from moeless.machine import cores, memory_bytes, processor_name, processor_quota

PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "datasets",
    "numpy",
    "scipy",
    "numba",
    "pyarrow",
    "safetensors",
    "matplotlib",
    "wandb",
    "optuna",
)


def git_state() -> dict[str, Any] | None:
    """``{revision, dirty}`` of the checkout that moeless runs from, None outside one."""
    root = Path(moeless.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python, moeless and what it builds on, read from package metadata."""
    found = {"python": platform.python_version(), "moeless": moeless.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _gpu_names() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return names


def hardware() -> dict[str, Any]:
    """CPU name, usable cores, processor quota in cores (None without one), memory in bytes, GPU names.

    Cores and memory are what this process may use, a container's limits included.
    """
    facts: dict[str, Any] = {"system": platform.system(), "machine": platform.machine(), "cpu": processor_name()}
    facts |= {"cores": cores(), "quota": processor_quota(), "memory_bytes": memory_bytes()}
    facts["gpus"] = _gpu_names()
    return facts


def kind_of(path: Path) -> str:
    """``trace``, ``predictor``, ``model``, ``result``, ``preset``, ``folder`` or ``file``."""
    marks = {"trace.json": "trace", "predictor.json": "predictor", "config.json": "model"}
    if path.is_dir():
        return next((kind for name, kind in marks.items() if (path / name).is_file()), "folder")
    return {"result.json": "result", "preset.json": "preset"}.get(path.name, "file")


def fingerprint(path: Path) -> dict[str, Any]:
    """``{kind, path, bytes, sha256}`` of a file or folder.

    A folder's hash is that of its sorted ``sha256  name`` lines. The kind is told by what is inside, so that an
    artefact has one name whether a run makes it or reads it.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    with reading(path):
        if path.is_file():
            return {"kind": kind_of(path), "path": str(path), "bytes": path.stat().st_size, "sha256": sha256(path)}
        if not path.is_dir():
            raise UserError(f"{path} does not exist")
        files = sorted(_files(path))
        lines = "".join(f"{sha256(entry)}  {entry.relative_to(path).as_posix()}\n" for entry in files)
        total = sum(entry.stat().st_size for entry in files)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return {"kind": kind_of(path), "path": str(path), "bytes": total, "sha256": digest}


def _files(folder: Path) -> Iterator[Path]:
    """Every file below a folder; one that cannot be listed is an error, not empty."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, onerror=refuse):
        yield from (path for path in (Path(parent, name) for name in names) if path.is_file())
