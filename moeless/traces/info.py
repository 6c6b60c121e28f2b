"""What ``trace.json`` says about a trace folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moeless import __version__
from moeless.errors import UserError
from moeless.files import read_json, write_json
from moeless.spec import MoESpec
from moeless.traces.schema import FORMAT, KINDS, Kind

INFO_FILE = "trace.json"


@dataclass(frozen=True)
class Shard:
    """One file of rows: its name in the folder, its rows, its size in bytes, its SHA-256."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TraceInfo:
    """A trace's description.

    Attributes:
        kind: ``tokens``, ``iterations`` or ``counts``.
        source: where the routing comes from: ``{"model": id, "revision": ...}`` or ``{"importer": name, "file": ...}``.
        prompt_source: what was asked, None where unknown.
        has_weights: whether rows hold gate weights.
        router_input_dtype: ``float16`` or ``bfloat16`` where gate inputs are kept, None where not.
        settings: how it was recorded (batch size, generation length, sampling ...).
        counts: totals: ``rows``, and ``requests`` or ``iterations``.
        shards: row files in order; ``files``: other files under checksum.
        notes: remarks that a reader of any figure made from this trace should see.
    """

    kind: Kind
    spec: MoESpec
    source: Mapping[str, Any]
    prompt_source: Mapping[str, Any] | None = None
    seed: int | None = None
    synthetic: bool = False
    has_weights: bool = True
    router_input_dtype: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    files: tuple[Shard, ...] = ()
    notes: tuple[str, ...] = ()
    complete: bool = False

    def to_json(self) -> dict[str, Any]:
        """A dictionary that ``from_json`` takes back."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "spec": self.spec.to_json(),
            "source": dict(self.source),
            "prompt_source": None if self.prompt_source is None else dict(self.prompt_source),
            "seed": self.seed,
            "synthetic": self.synthetic,
            "has_weights": self.has_weights,
            "router_input_dtype": self.router_input_dtype,
            "settings": dict(self.settings),
            "counts": dict(self.counts),
            "versions": dict(self.versions),
            "notes": list(self.notes),
            "shards": [asdict(shard) for shard in self.shards],
            "files": [asdict(entry) for entry in self.files],
            "complete": self.complete,
        }

    @classmethod
    def from_json(cls, data: Any, where: str) -> TraceInfo:
        """Read and check ``trace.json``'s content.

        Raises:
            UserError: it is not one, or of a newer format.
        """
        if not isinstance(data, Mapping) or "format" not in data or "kind" not in data:
            raise UserError(f"{where} does not describe a trace: it has no format or kind")
        if data["format"] != FORMAT:
            raise UserError(f"{where} has trace format {data['format']!r}; this version reads format {FORMAT}")
        if data["kind"] not in KINDS:
            raise UserError(f"{where} has kind {data['kind']!r}; a trace's kind is one of {', '.join(KINDS)}")
        try:
            prompt_source = data.get("prompt_source")
            return cls(
                kind=data["kind"],
                spec=MoESpec.from_json(data["spec"]),
                source=dict(data["source"]),
                prompt_source=None if prompt_source is None else dict(prompt_source),
                seed=None if data.get("seed") is None else int(data["seed"]),
                synthetic=bool(data.get("synthetic", False)),
                has_weights=bool(data["has_weights"]),
                router_input_dtype=data.get("router_input_dtype"),
                settings=dict(data.get("settings", {})),
                counts={str(key): int(value) for key, value in data.get("counts", {}).items()},
                versions=dict(data.get("versions", {})),
                shards=tuple(_shard(entry) for entry in data["shards"]),
                files=tuple(_shard(entry) for entry in data.get("files", ())),
                notes=tuple(str(note) for note in data.get("notes", ())),
                complete=bool(data["complete"]),
            )
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where} does not describe a trace: {error!r}") from None

    @classmethod
    def read(cls, folder: Path) -> TraceInfo:
        """Read a folder's ``trace.json``.

        Raises:
            UserError: the folder is none, or holds no valid description.
        """
        if not folder.exists():
            raise UserError(f"there is no trace at {folder}: the folder does not exist")
        if not folder.is_dir():
            raise UserError(f"{folder} is a file; a trace is a folder with {INFO_FILE} in it")
        path = folder / INFO_FILE
        if not path.exists():
            raise UserError(f"{folder} is not a trace: it holds no {INFO_FILE}")
        return cls.from_json(read_json(path), str(path))

    def write(self, folder: Path) -> None:
        """Write ``trace.json`` atomically."""
        write_json(folder / INFO_FILE, self.to_json())

    def with_(self, **changes: Any) -> TraceInfo:
        """A copy with fields replaced."""
        return replace(self, **changes)


def _shard(entry: Mapping[str, Any]) -> Shard:
    shard = Shard(str(entry["file"]), int(entry["rows"]), int(entry["bytes"]), str(entry["sha256"]))
    # a name that leaves the folder must not be followed
    if Path(shard.file).name != shard.file:
        raise ValueError(f"shard name {shard.file!r} is not a plain file name")
    return shard


def library_versions(*packages: str) -> dict[str, str]:
    """Installed versions of moeless and of those packages that are there."""
    found = {"moeless": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
