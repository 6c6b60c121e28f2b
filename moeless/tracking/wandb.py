"""Mirrors a run to Weights & Biases; the run itself never depends on it.

Offline unless logged in; what W&B's own settings forbid (``WANDB_MODE``, ``wandb offline``, ...) is not done, and
where its server cannot be reached the run is kept offline. Whatever W&B raises is caught, turned into one warning, and
ends the mirror, not the run. Lineage is carried by artefact names that hold the content's hash: the run that made
``trace-1a2b…`` logs it, a run that reads the same bytes uses the same name.
"""

from __future__ import annotations

import configparser
import netrc
import os
import socket
import sys
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from moeless.credentials import mask
from moeless.errors import UserError
from moeless.files import check_writable

#: An artefact larger than this is mirrored by name, size and hash, without its bytes.
MAX_UPLOAD_BYTES = 64 * 2**20
#: Seconds that W&B gets to send what is left, and after an interruption: whoever sends SIGTERM soon kills.
FINISH_SECONDS, HURRY_SECONDS = 60.0, 3.0
#: Seconds until a server that does not answer is taken to be out of reach, and until it has to have taken the run.
REACH_SECONDS, START_SECONDS = 3.0, 10.0


Mode = Literal["disabled", "offline", "online"]
#: Every mode that W&B knows.
_MODES: dict[str, Mode] = {"disabled": "disabled", "offline": "offline", "dryrun": "offline"}
_MODES |= {"online": "online", "run": "online", "shared": "online"}
_NO = ("", "0", "false", "no", "off")


def choose_mode(wanted: bool | None) -> Mode:
    """``disabled``, ``offline`` or ``online``: the flag, then W&B's own settings, then whether a login is stored.

    Nothing is imported and no network is used. As for W&B itself, the environment goes before the settings files that
    ``wandb offline`` and ``wandb disabled`` write. Words that W&B does not know mean offline.
    """
    if wanted is False:
        return "disabled"
    stored = _stored_settings()
    told = os.environ.get("WANDB_MODE", "").strip().lower()
    said = told or stored.get("mode", "").strip().lower()
    mode = _MODES.get(said, "offline") if said else None
    if os.environ.get("WANDB_DISABLED", "").lower() not in _NO:
        mode = "disabled"
    elif not told and stored.get("disabled", "").lower() not in _NO:
        # what older versions of `wandb offline` write
        mode = mode if mode == "disabled" else "offline"
    if mode == "disabled":
        return "offline" if wanted else "disabled"
    if mode == "offline" or (mode == "online" and told):
        return mode
    return "online" if _logged_in(stored) else "offline"


def _stored_settings() -> dict[str, str]:
    """W&B's settings files: the user's, and over it the working folder's."""
    folders = [Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb")]
    folders += [Path(os.environ.get("WANDB_DIR") or ".", name) for name in ("wandb", ".wandb")]
    parser = configparser.ConfigParser(interpolation=None)
    for folder in folders:
        try:
            parser.read(folder.expanduser() / "settings", encoding="utf-8")
        except (OSError, UnicodeDecodeError, configparser.Error, RuntimeError):
            # without a home there is none of the user's
            continue
    return dict(parser["default"]) if parser.has_section("default") else {}


def _logged_in(stored: Mapping[str, str]) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = urlparse(os.environ.get("WANDB_BASE_URL") or stored.get("base_url") or "https://api.wandb.ai")
    named = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in named:
        try:
            hosts = netrc.netrc(str(Path(path).expanduser())).hosts
        except (OSError, UnicodeDecodeError, netrc.NetrcParseError, RuntimeError):
            continue
        if server.hostname in hosts or server.netloc in hosts:
            return True
    return False


def _give_folders(instead: Path) -> None:
    """W&B keeps caches, staged files and settings at home; where home cannot be written, beside the run's own."""
    for kind, variable, usual in (
        ("CACHE", "XDG_CACHE_HOME", "~/.cache"),
        ("DATA", "XDG_DATA_HOME", "~/.local/share"),
        ("CONFIG", "XDG_CONFIG_HOME", "~/.config"),
    ):
        if os.environ.get(f"WANDB_{kind}_DIR"):
            continue
        try:
            check_writable(Path(os.environ.get(variable) or usual).expanduser() / "wandb")
        except (OSError, RuntimeError, UserError):
            os.environ[f"WANDB_{kind}_DIR"] = str((instead / kind.lower()).absolute())


def _within_reach(address: str) -> bool:
    """Whether a server takes connections; where a proxy stands between, only W&B itself can tell."""
    server = urlparse(address)
    proxies = urllib.request.getproxies()
    if not server.hostname or server.scheme in proxies or "all" in proxies:
        return True
    port = server.port or (80 if server.scheme == "http" else 443)
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((server.hostname, port), timeout=REACH_SECONDS).close()
        except OSError:
            return
        answered.set()

    # resolving a name knows no timeout of its own
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return answered.is_set()


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
            self._run = self._start(manifest, mode, wanted)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self._give_up("start", error)
            return
        if self._run is None:
            return
        for entry in manifest["inputs"]:
            self._use(entry)

    def _start(self, manifest: Mapping[str, Any], mode: Mode, wanted: bool | None) -> Any:
        _give_folders(self.path / "wandb")
        import wandb

        own = wandb.setup().settings if mode == "online" and hasattr(wandb, "setup") else None
        said = _MODES.get(str(getattr(own, "mode", mode)), "offline")
        if said != "online":
            # W&B has sources of settings of its own
            mode = said if said == "offline" or not wanted else "offline"
        if mode == "disabled":
            return None
        if mode == "online":
            try:
                if own is not None and not _within_reach(str(own.base_url)):
                    raise ConnectionError("its server cannot be reached")
                return self._open(manifest, "online")
            except Exception as error:
                begun = f"W&B took no run ({_sentence(error)})"
            run = self._open(manifest, "offline")
            self._problems.append(f"{begun}; it is kept offline: `wandb sync {self._offline_folder(run)}` sends it")
            sys.stderr.write(f"moeless: {self._problems[-1]}\n")
            return run
        return self._open(manifest, mode)

    def _offline_folder(self, run: Any) -> str:
        folder = getattr(getattr(run, "settings", None), "sync_dir", None)
        return os.path.relpath(folder) if folder else f"{self.path}/wandb/offline-run-*"

    def _open(self, manifest: Mapping[str, Any], mode: Mode) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, init_timeout=START_SECONDS, login_timeout=5
        )
        # newer than the oldest supported version: set where they exist
        for name, value in (("x_disable_stats", True), ("x_disable_meta", True), ("finish_timeout", FINISH_SECONDS)):
            if hasattr(settings, name):
                setattr(settings, name, value)
        config = {key: manifest[key] for key in ("command", "config", "seed", "git", "versions", "hardware", "inputs")}
        options = {
            "project": os.environ.get("WANDB_PROJECT", "moeless"),
            "name": self.path.name,
            "job_type": manifest["command"],
            "dir": str(self.path),
            "mode": mode,
            "config": config,
            "settings": settings,
        }
        try:
            return wandb.init(**options, reinit="create_new")
        except ValueError:
            # before 0.19.10 a yes or a no
            return wandb.init(**options, reinit=True)

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
        """End the mirror, waiting a minute at the most; returns what went wrong, one sentence each.

        An interrupted run waits a few seconds only.
        """
        run, self._run = self._run, None
        if run is not None:
            seconds = HURRY_SECONDS if status == "interrupted" else FINISH_SECONDS
            failed: list[str] = []

            def end() -> None:
                try:
                    run.finish(exit_code=0 if status == "ok" else 1)
                except Exception as error:
                    failed.append(f"W&B could not finish ({_sentence(error)}); the run folder is complete")

            thread = threading.Thread(target=end, daemon=True)
            thread.start()
            thread.join(seconds)
            if thread.is_alive():
                failed.append(f"W&B did not finish within {seconds:.0f} seconds; the run folder is complete")
            self._problems += failed
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
    return mask((str(error).strip().splitlines() or [type(error).__name__])[0], sys.argv[1:])[:200]


def _quietly(call: Any) -> None:
    try:
        call()
    except Exception:
        return
