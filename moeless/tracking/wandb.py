"""Mirrors a run to Weights & Biases; the run itself never depends on it.

Offline unless logged in or told otherwise by ``WANDB_MODE``. Whatever W&B raises is caught, turned into one
warning, and ends the mirror, not the run. Lineage is carried by artefact names that hold the content's hash:
the run that made ``trace-1a2b…`` logs it, a run that reads the same bytes uses the same name.
"""

from __future__ import annotations

import netrc
import os
import threading
from collections.abc import Mapping
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
        if self._run is None or not cells:
            return
        columns = sorted({key for cell in cells for key in cell})

        def send() -> None:
            import wandb

            # text in every column: a column that is null in some rows has no one type
            rows = [[None if cell.get(key) is None else str(cell[key]) for key in columns] for cell in cells]
            self._run.log({"result": wandb.Table(columns=columns, data=rows)})

        self._attempt("log the result table", send)

    def image(self, name: str, png: Path, caption: str) -> None:
        """A figure."""

        def send() -> None:
            import wandb

            self._run.log({f"figures/{name}": wandb.Image(str(png), caption=caption)})

        if self._run is not None:
            self._attempt(f"log the figure {name}", send)

    def produced(self, path: Path, entry: Mapping[str, Any]) -> None:
        """An artefact that this run made."""

        def send() -> None:
            import wandb

            artifact = wandb.Artifact(artifact_name(entry), type=str(entry["kind"]), metadata=_metadata(entry))
            if entry["bytes"] <= MAX_UPLOAD_BYTES:
                # immutable: upload from where it lies, no second copy in the home folder
                add = artifact.add_dir if path.is_dir() else artifact.add_file
                add(str(path), policy="immutable")
            self._run.log_artifact(artifact)

        if self._run is not None:
            self._attempt("log an artefact", send)

    def _use(self, entry: Mapping[str, Any]) -> None:
        """An artefact that this run reads; offline W&B refuses links, then its config alone holds the hash."""
        if self._run is None or getattr(self._run, "offline", False):
            return

        def send() -> None:
            import wandb

            kind = str(entry["kind"])
            self._run.use_artifact(wandb.Artifact(artifact_name(entry), type=kind, metadata=_metadata(entry)))

        self._attempt("link an input", send)

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
