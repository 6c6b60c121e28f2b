"""The run folder: ``manifest.json``, ``metrics.jsonl``, ``result.json``, figures, page.

A run keeps whatever it wrote, with the status ``ok``, ``failed`` or ``interrupted``; a request that is
refused before it wrote anything leaves no folder behind.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moeless.credentials import command_line, mask, mask_json
from moeless.errors import RunFailed, UserError
from moeless.files import check_writable, read_json, refusal, write_atomic, write_json
from moeless.tracking import environment
from moeless.tracking.wandb import Mirror

RUNS = Path("results/runs")
MANIFEST = "manifest.json"
#: Glyphs as paths: a figure looks the same wherever it is opened; the salt makes equal figures equal bytes.
_SAVE = {"savefig.bbox": "tight", "savefig.pad_inches": 0.03, "savefig.dpi": 220, "svg.fonttype": "path"}
_SAVE |= {"pdf.fonttype": 42}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Run:
    """One command's record; made by :func:`start_run`.

    Attributes:
        path: the run folder.
        manifest: content of ``manifest.json``; rewritten when the run ends.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], mirror: Mirror) -> None:
        self.path = path
        self.manifest = manifest
        self.mirror = mirror
        self._started = time.monotonic()
        self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row of numbers or short texts to ``metrics.jsonl`` and the mirror."""
        row = mask_json(row)
        stamped = {"seconds": round(self.elapsed, 6), **row}
        self._metrics.write(json.dumps(stamped, allow_nan=False, ensure_ascii=False, default=_plain) + "\n")
        self.mirror.log(row)

    def write_result(self, result: Any) -> Path:
        """Write ``result.json`` from a :class:`moeless.metrics.Result` or a JSON-ready dictionary."""
        data = mask_json(result.to_json() if hasattr(result, "to_json") else result)
        path = self.path / "result.json"
        write_json(path, data)
        self.mirror.summary(data)
        self.produced(path)
        return path

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table in the mirror; the run folder holds it already."""
        self.mirror.table(name, columns, rows)

    def figure(
        self, name: str, figure: Any, title: str = "", caption: str = "", formats: Sequence[str] = ("svg", "png")
    ) -> Path:
        """Save a matplotlib figure as ``figures/<name>.svg``, ``.png`` (and ``.pdf``); return the SVG's path.

        ``title`` and ``caption`` go into the list of figures from which a page can be written again.
        """
        save_figure(self.path / "figures", name, figure, formats)
        return self.drawn(name, title, caption)

    def drawn(self, name: str, title: str = "", caption: str = "") -> Path:
        """List a figure that is already in the folder, drawn by another process; return the SVG's path."""
        folder = self.path / "figures"
        self.manifest["figures"].append({"name": name, "title": title, "caption": caption})
        self.mirror.image(name, folder / f"{name}.png", title or name)
        return folder / f"{name}.svg"

    def produced(self, path: Path, kind: str | None = None) -> None:
        """Record an artefact (trace, predictor, plan, result) that this run made, with its hash."""
        entry = environment.fingerprint(path)
        entry["kind"] = kind or entry["kind"]
        if path.is_relative_to(self.path):
            entry["path"] = path.relative_to(self.path).as_posix()
        self.manifest["outputs"].append(entry)
        self.mirror.produced(path, entry)

    def warn(self, sentence: str) -> None:
        """Keep a remark about the run's validity; repeated ones are kept once."""
        sentence = mask(sentence)
        if sentence not in self.manifest["warnings"]:
            self.manifest["warnings"].append(sentence)

    def snapshot(self) -> dict[str, Any]:
        """The manifest as it will stand if the run ends now and well, for the page that closes a run."""
        return {**self.manifest, "status": "ok", "end": _now(), "seconds": round(self.elapsed, 3)}

    @property
    def elapsed(self) -> float:
        """Seconds since the run started."""
        return time.monotonic() - self._started

    def _finish(self, status: str, error: str | None) -> None:
        self._metrics.close()
        self.manifest |= {"status": status, "error": error, "end": _now(), "seconds": round(self.elapsed, 3)}
        # before W&B: whoever asked the run to end may not wait for it
        write_json(self.path / MANIFEST, self.manifest)
        known = len(self.manifest["warnings"])
        for sentence in self.mirror.finish(status):
            self.warn(sentence)
        if len(self.manifest["warnings"]) > known:
            write_json(self.path / MANIFEST, self.manifest)

    def _untouched(self) -> bool:
        """Whether the folder holds nothing beyond what starting the run put there."""
        expected = {MANIFEST, "metrics.jsonl", *self.mirror.own_files}
        names = {entry.name for entry in self.path.iterdir()}
        return names <= expected and (self.path / "metrics.jsonl").stat().st_size == 0


@contextmanager
def start_run(
    command: str,
    name: str,
    config: Mapping[str, Any],
    seed: int | None = None,
    inputs: Sequence[Path] = (),
    out: Path | None = None,
    wandb: bool | None = None,
) -> Iterator[Run]:
    """Open a run folder, yield the :class:`Run`, and record how it ended.

    Args:
        command: the command, for example ``serve-bench``; ``name`` says what it ran on.
        config: the resolved configuration, JSON-ready.
        inputs: files and folders that the run reads; their hashes go into the manifest.
        out: the run folder; default ``results/runs/<utc>-<command>-<name>``.
        wandb: True or False from ``--wandb/--no-wandb``; None mirrors offline, online where logged in.

    Raises:
        UserError: ``out`` exists and is not an empty folder, or cannot be written, or an input is missing or cannot be
            read.
        RunFailed: the disk filled up; everything written before stays.
    """
    fingerprints = [environment.fingerprint(Path(path)) for path in inputs]
    name = mask(name)
    try:
        path, existed = _claim(out, command, name)
    except OSError as error:
        raise UserError(f"no run folder can be made: {refusal(error) or error.strerror or error}") from error
    manifest: dict[str, Any] = {
        "format": 1,
        "status": "running",
        "error": None,
        "command": command,
        "name": name,
        "command_line": command_line("moeless", sys.argv[1:]),
        "config": mask_json(json.loads(json.dumps(config, default=_plain))),
        "seed": seed,
        "git": environment.git_state(),
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "inputs": mask_json(fingerprints),
        "outputs": [],
        "figures": [],
        "warnings": [],
        "start": _now(),
        "end": None,
        "seconds": None,
    }
    with _terminate_as_interrupt():
        try:
            write_json(path / MANIFEST, manifest)
            run = Run(path, manifest, Mirror(path, manifest, wandb))
        except OSError as error:
            _remove(path, existed)
            raise RunFailed(f"cannot start the run in {path}: {error.strerror or error}") from error
        except BaseException:
            _remove(path, existed)
            raise
        try:
            yield run
        except BaseException as error:
            _record(run, error, existed)
            if isinstance(error, Exception) and _disk_full(error):
                raise RunFailed(f"the disk is full; what was written so far is kept in {path}") from error
            raise
        run._finish("ok", None)


def save_figure(folder: Path, name: str, figure: Any, formats: Sequence[str]) -> None:
    """Write a matplotlib figure in each format; equal figures give equal bytes."""
    import matplotlib as mpl

    with mpl.rc_context(_SAVE | {"svg.hashsalt": name}):
        # the layout is solved once, not anew for every format
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for kind in formats:
            metadata = {"Date": None} if kind == "svg" else {"CreationDate": None} if kind == "pdf" else None

            def save(partial: Path, kind: str = kind, metadata: Any = metadata) -> None:
                figure.savefig(partial, format=kind, metadata=metadata)

            write_atomic(folder / f"{name}.{kind}", save)


def _disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error: libraries wrap it in errors of their own, other processes in text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _record(run: Run, error: BaseException, existed: bool) -> None:
    refused = isinstance(error, UserError) or (isinstance(error, OSError) and refusal(error) is not None)
    if refused and run._untouched():
        run._metrics.close()
        run.mirror.finish("interrupted")
        _remove(run.path, existed)
        return
    status = "failed"
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        status = "interrupted"
    elif type(error).__name__ in ("Exit", "SystemExit") and not (
        getattr(error, "exit_code", None) or getattr(error, "code", None)
    ):
        status = "ok"
    message = None if status == "ok" else mask(f"{type(error).__name__}: {error}", sys.argv[1:]).removesuffix(": ")
    try:
        run._finish(status, message)
    except OSError:
        # the disk is full or gone: the first error is the one that matters
        sys.stderr.write(f"moeless: could not record the end of the run in {run.path}\n")


def _claim(out: Path | None, command: str, name: str) -> tuple[Path, bool]:
    """Create the run folder; True where an empty one was there."""
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} already exists and is not empty; choose another --out or remove it first")
        existed = out.is_dir()
        check_writable(out)
        out.mkdir(parents=True, exist_ok=True)
        return out, existed
    check_writable(RUNS)
    RUNS.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{command}-{slug(name)}"
    for attempt in range(1, 1000):
        path = RUNS / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path, False
    raise RunFailed(f"{RUNS} already holds 999 runs called {stem}")


def _remove(path: Path, existed: bool) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if existed:
        path.mkdir(exist_ok=True)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM, and a terminal that closes, end the run like Ctrl-C, so that its manifest says so.

    Only the main thread can; under ``nohup`` a closing terminal ends nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def slug(text: str) -> str:
    """A name fit for a folder: lower-case letters, digits, dots and dashes, at most 60 characters."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:60] or "run"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        UserError: the folder is missing or is not a run.
    """
    if not run.is_dir():
        raise UserError(f"{run} is no run folder: it does not exist" if not run.exists() else f"{run} is a file")
    if not (run / MANIFEST).is_file():
        raise UserError(f"{run} is no run folder: it holds no {MANIFEST}")
    manifest = read_json(run / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != 1:
        raise UserError(f"{run / MANIFEST} is not a manifest of format 1")
    return manifest


def find_runs(root: Path = RUNS) -> list[Path]:
    """Run folders directly under ``root``, oldest first."""
    if not root.is_dir():
        return []
    return sorted(entry for entry in root.iterdir() if (entry / MANIFEST).is_file())
