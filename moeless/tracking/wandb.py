"""Mirrors a run to Weights & Biases; the run itself never depends on it.

Offline unless logged in or told otherwise by ``WANDB_MODE``. Whatever W&B raises is caught, turned into one
warning, and ends the mirror, not the run. Lineage is carried by artefact names that hold the content's hash:
the run that made ``trace-1a2b…`` logs it, a run that reads the same bytes uses the same name.
"""

from __future__ import annotations

import netrc
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlparse

#: An artefact larger than this is mirrored by name, size and hash, without its bytes.
MAX_UPLOAD_BYTES = 64 * 2**20
FINISH_SECONDS = 60.0


Mode = Literal["disabled", "offline", "online"]


def choose_mode(wanted: bool | None) -> Mode:
    """``disabled``, ``offline`` or ``online``: the flag, then ``WANDB_MODE``, then whether a login is stored."""
    if wanted is False:
        return "disabled"
    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode in ("disabled", "offline", "online"):
        return "offline" if mode == "disabled" and wanted else cast(Mode, mode)
    return "online" if _logged_in() else "offline"


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False


class Mirror:
    """A run's copy in W&B; every method is safe to call whatever state W&B is in.

    Args:
        path: the run folder; W&B's own files go to ``<path>/wandb``.
        manifest: as it stands when the run starts.
        wanted: ``--wandb`` (True), ``--no-wandb`` (False) or neither (None).
    """

    own_files = frozenset({"wandb"})

    def __init__(self, path: Path, manifest: Mapping[str, Any], wanted: bool | None) -> None:
        self.path = path
        self._run: Any = None
        self._problems: list[str] = []
        mode = choose_mode(wanted)
        if mode == "disabled":
            return
        try:
            self._run = self._start(manifest, mode)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self._give_up("start", error)
            return
        for entry in manifest["inputs"]:
            self._use(entry)

    def _start(self, manifest: Mapping[str, Any], mode: Mode) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, init_timeout=20.0, login_timeout=5
        )
        # newer than the oldest supported version: set where they exist
        for name, value in (("x_disable_stats", True), ("x_disable_meta", True), ("finish_timeout", FINISH_SECONDS)):
            if hasattr(settings, name):
                setattr(settings, name, value)
        config = {key: manifest[key] for key in ("command", "config", "seed", "git", "versions", "hardware", "inputs")}
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "moeless"),
            name=self.path.name,
            job_type=manifest["command"],
            dir=str(self.path),
            mode=mode,
            config=config,
            settings=settings,
            reinit="create_new",
        )

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics."""
        if self._run is not None:
            self._attempt("log metrics", lambda: self._run.log(dict(row)))

    def summary(self, result: Mapping[str, Any]) -> None:
        """The result's cells as a table."""
        cells = [_flat(cell) for cell in result.get("cells", [])]
        columns = sorted({key for cell in cells for key in cell})
        self.table("result", columns, [[cell.get(key) for key in columns] for cell in cells])

    def image(self, name: str, png: Path, caption: str) -> None:
        """A figure."""

        def send() -> None:
            import wandb

            self._run.log({f"figures/{name}": wandb.Image(str(png), caption=caption)})

        if self._run is not None:
            self._attempt(f"log the figure {name}", send)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of the run, text in every column: a column that is null in some rows has no one type."""

        def send() -> None:
            import wandb

            texts = [[None if cell is None else str(cell) for cell in row] for row in rows]
            self._run.log({name: wandb.Table(columns=list(columns), data=texts)})

        if self._run is not None and rows:
            self._attempt(f"log the table {name}", send)

    def produced(self, path: Path, entry: Mapping[str, Any]) -> None:
        """An artefact that this run made."""
        if self._run is not None:
            self._attempt("log an artefact", lambda: self._run.log_artifact(_artifact(entry, path)))

    def _use(self, entry: Mapping[str, Any]) -> None:
        """An artefact that this run reads, so that W&B draws the line from the run that made it.

        W&B's public call refuses to work offline, although an offline log can carry the same record; where this
        version of W&B has no way to write it, the hashes in the run's configuration are what remains.
        """
        if self._run is None:
            return
        if not getattr(self._run, "offline", False):
            self._attempt("link an input", lambda: self._run.use_artifact(_artifact(entry, Path(str(entry["path"])))))
            return
        record = getattr(self._run, "_log_artifact", None)
        try:
            if record is not None:
                record(_artifact(entry, Path(str(entry["path"]))), is_user_created=True, use_after_commit=True)
        except TypeError:
            return
        except Exception as error:
            self._give_up("link an input", error)

    def finish(self, status: str) -> list[str]:
        """End the mirror, waiting at most a minute; returns what went wrong, one sentence each."""
        run, self._run = self._run, None
        if run is not None:

            def end() -> None:
                try:
                    run.finish(exit_code=0 if status == "ok" else 1)
                except Exception as error:
                    self._problems.append(f"W&B could not finish ({_sentence(error)}); the run folder is complete")

            thread = threading.Thread(target=end, daemon=True)
            thread.start()
            thread.join(FINISH_SECONDS)
            if thread.is_alive():
                self._problems.append("W&B did not finish within a minute; the run folder is complete")
        return self._problems

    def _attempt(self, what: str, send: Any) -> None:
        try:
            send()
        except Exception as error:
            self._give_up(what, error)

    def _give_up(self, what: str, error: BaseException) -> None:
        self._problems.append(f"W&B could not {what} ({_sentence(error)}); the run folder is complete")
        run, self._run = self._run, None
        if run is not None:
            threading.Thread(target=_quietly, args=(run.finish,), daemon=True).start()


def _artifact(entry: Mapping[str, Any], path: Path) -> Any:
    """The same bytes give the same artefact, whether a run made them or reads them."""
    import wandb

    artifact = wandb.Artifact(artifact_name(entry), type=str(entry["kind"]), metadata=_metadata(entry))
    if entry["bytes"] <= MAX_UPLOAD_BYTES:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            # immutable: upload from where it lies, no second copy in the home folder
            artifact.add_file(str(file), name=name, policy="immutable")
    return artifact


def artifact_name(entry: Mapping[str, Any]) -> str:
    """Kind and content hash: the same bytes have the same name in every run."""
    return f"{entry['kind']}-{entry['sha256'][:16]}"


def _metadata(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"sha256": entry["sha256"], "bytes": entry["bytes"], "name": Path(str(entry["path"])).name}


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, (list, tuple)):
            flat[f"{prefix}{key}"] = value
    return flat


def _sentence(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _quietly(call: Any) -> None:
    try:
        call()
    except Exception:
        return
