"""Results of jobs, kept under the hash of everything that they depend on.

A key covers the function, its parameters, the keys of what it needs, and the source code that computes; that of a
wall-clock measurement also the machine. An entry carries its own hash; one that does not match is reported in a
sentence and made again. Several processes, on several machines too, may share a cache: who comes second finds the
first one's result and leaves it as it is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moeless.errors import UserError
from moeless.experiments.base import Job
from moeless.files import folder_atomic, read_json, sha256, sibling, write_text
from moeless.fingerprint import code_hash
from moeless.tracking.environment import hardware

#: Default place, relative to the working folder.
CACHE = Path("results/.cache")
#: An artefact's file of wall-clock measurements: it must be there, its content differs from run to run.
TIMING = "timing.json"


def canonical(data: Any) -> str:
    """JSON with sorted keys and no spaces: equal data, equal bytes."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def digest(data: Any) -> str:
    """Hash of the canonical JSON."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("numpy", "scipy", "torch", "transformers")}


@cache
def machine() -> dict[str, Any]:
    """What wall-clock times depend on: the processor and its usable cores; no job is timed on a GPU."""
    facts = hardware()
    return {name: facts[name] for name in ("machine", "cpu", "cores")}


def job_key(job: Job) -> str:
    """The hash of everything that a job's result depends on."""
    if job.given is not None:
        return digest({"given": job.params})
    needs = [job_key(need) for need in job.needs]
    parts = {"function": job.function, "params": job.params, "needs": needs, "artefact": job.artefact}
    if job.timed:
        parts["machine"] = machine()
    return digest({**parts, "code": code_hash(), "versions": _versions()})


class Cache:
    """Entries of one cache folder.

    Attributes:
        problems: one sentence for every corrupt entry that was found.
    """

    def __init__(self, root: Path = CACHE) -> None:
        self.root = root
        self.problems: list[str] = []

    def entry(self, job: Job) -> Path:
        """The file that holds a cell's data or an artefact's file list."""
        key = job_key(job)
        return self.root / ("artefacts" if job.artefact else "cells") / key[:2] / f"{key}.json"

    def folder(self, job: Job) -> Path:
        """An artefact's folder."""
        return job.given if job.given is not None else self.entry(job).with_suffix("")

    def has(self, job: Job) -> bool:
        """Whether a sound entry is there; a corrupt one is reported and removed."""
        if job.given is not None:
            return True
        path = self.entry(job)
        if not path.exists():
            return False
        try:
            self._check(job, path)
        except (UserError, KeyError, TypeError, ValueError, OSError) as error:
            self.problems.append(f"the cached result of {job.label!r} is damaged ({error}) and was made again")
            self.drop(job)
            return False
        return True

    def drop(self, job: Job) -> None:
        """Forget an entry."""
        self.entry(job).unlink(missing_ok=True)
        if job.artefact:
            _remove(self.folder(job))

    def read(self, job: Job) -> Any:
        """A cell's data, or an artefact's folder; the entry must be there."""
        return self.folder(job) if job.artefact or job.given is not None else read_json(self.entry(job))["data"]

    def write(self, job: Job, data: Any) -> None:
        """Keep a cell's data, or record an artefact's files; what another process kept meanwhile stays."""
        if self.has(job):
            return
        content = _files(self.folder(job)) if job.artefact else data
        entry = {"format": 1, "label": job.label, "sha256": digest(content), "data": content}
        write_text(self.entry(job), json.dumps(entry, indent=1, allow_nan=False, ensure_ascii=False) + "\n")

    def _check(self, job: Job, path: Path) -> None:
        entry = read_json(path)
        if entry["format"] != 1:
            raise ValueError(f"format {entry['format']}")
        if digest(entry["data"]) != entry["sha256"]:
            raise ValueError("its hash does not match")
        if job.artefact and _files(self.folder(job)) != entry["data"]:
            raise ValueError("its files have changed")


def _files(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): "timed" if path.name == TIMING else sha256(path) for path in files}


def compute(job: Job, needs: list[Any], folder: Path | None) -> Any:
    """Run a job's function; an artefact's folder appears whole or not at all."""
    import importlib

    module, _, name = job.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    if folder is None:
        return function(dict(job.params), needs)
    made = sibling(folder)
    with folder_atomic(made) as partial:
        function(dict(job.params), needs, partial)
    _settle(made, folder)
    return None


def _settle(made: Path, folder: Path) -> None:
    """Give a new artefact its name, unless another process was first."""
    while True:
        try:
            made.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # its entry vouches for it, or will in a moment
        if folder.with_name(f"{folder.name}.json").exists() or _same_files(made, folder):
            shutil.rmtree(made)
            return
        _remove(folder)


def _same_files(made: Path, folder: Path) -> bool:
    try:
        return _files(made) == _files(folder)
    except FileNotFoundError:
        # it is being removed
        return False


def _remove(folder: Path) -> None:
    """Remove a folder in such a way that nobody takes what is left of it for a whole one."""
    aside = sibling(folder)
    try:
        folder.rename(aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)
