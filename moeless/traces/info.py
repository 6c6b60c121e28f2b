"""What a trace folder holds: the columns of its files, ``trace.json``, and its dataset card (``docs/formats.md``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from moeless import __version__
from moeless.errors import UserError
from moeless.files import read_json, reading, sha256, write_json
from moeless.spec import MoESpec

FORMAT = 1
INFO_FILE = "trace.json"
CARD_FILE = "README.md"
REQUESTS_FILE = "requests.parquet"
Kind = Literal["tokens", "iterations", "counts"]

#: Unknown token id or position, in arrays; the files hold nulls.
UNKNOWN = -1
#: What mends a trace whose files are broken.
AGAIN = "copy or record the trace again"
#: Rows of one Parquet row group, at most: the unit of reading.
ROW_GROUP_ROWS = 16_384
#: Bytes of one row group before compression, at most; wide models get fewer rows.
ROW_GROUP_BYTES = 64 * 2**20


def _column(name: str, kind: pa.DataType, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable)


class _Layout(NamedTuple):
    """How the files of one kind of trace look.

    ``columns`` are those before the vectors; ``what`` names the kind in sentences, ``card`` on the dataset card.
    """

    shards: str
    columns: tuple[pa.Field, ...]
    what: str
    card: str


_PHASE_AND_TOKEN = (_column("phase", pa.uint8()), _column("token", pa.int32(), nullable=True))
KINDS: dict[Kind, _Layout] = {
    "tokens": _Layout(
        "tokens",
        (_column("request", pa.uint32()), _column("position", pa.uint32()), *_PHASE_AND_TOKEN),
        "tokens (routing per request)",
        "One row per token whose routing was computed, sorted by request and position; `experts` and `weights` "
        "are flat vectors, index `layer * top_k + k`, in the gate's order. Phase 0 is prefill, 1 decode.",
    ),
    "iterations": _Layout(
        "tokens",
        (
            _column("iteration", pa.uint32()),
            _column("rank", pa.uint16()),
            _column("position", pa.uint32(), nullable=True),
            *_PHASE_AND_TOKEN,
        ),
        "iterations (routing per forward pass)",
        "One row per token, sorted by iteration and rank of the serving engine that recorded it; `experts` "
        "is a flat vector, index `layer * top_k + k`. Phase 0 is prefill, 1 decode, 255 mixed or unknown.",
    ),
    "counts": _Layout(
        "counts",
        (
            _column("iteration", pa.uint32()),
            _column("phase", pa.uint8()),
            _column("tokens", pa.uint32(), nullable=True),
        ),
        "counts (loads only)",
        "One row per forward pass; `load` is a flat vector of tokens per expert, index `layer * experts + expert`.",
    ),
}
REQUESTS_SCHEMA = pa.schema(
    [
        _column("request", pa.uint32()),
        _column("first_row", pa.uint64()),
        _column("prompt_tokens", pa.uint32()),
        _column("output_tokens", pa.uint32()),
        _column("category", pa.string(), nullable=True),
        _column("source_id", pa.string(), nullable=True),
    ]
)


def row_schema(kind: Kind, spec: MoESpec, *, weights: bool) -> pa.Schema:
    """Columns of one shard of that kind; vectors are flat, index ``l*K+k`` or ``l*E+e``."""
    top, all_experts = spec.L * spec.K, spec.L * spec.E
    vectors = [("load", pa.uint32(), all_experts)] if kind == "counts" else [("experts", pa.uint16(), top)]
    if weights and kind != "counts":
        vectors.append(("weights", pa.float16(), top))
    fields = [_column(name, pa.list_(_column("element", value), length)) for name, value, length in vectors]
    return pa.schema([*KINDS[kind].columns, *fields])


def row_group_rows(bytes_per_row: int) -> int:
    """Rows per row group for rows of that width."""
    return max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // max(1, bytes_per_row)))


@dataclass(frozen=True)
class Shard:
    """One file of rows: its name in the folder, its rows, its size in bytes, its SHA-256."""

    file: str
    rows: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, rows: int) -> Shard:
        """The description of a file of that many rows."""
        return cls(path.name, rows, path.stat().st_size, sha256(path))

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Shard:
        """A shard of ``trace.json``; a name that leaves the folder is a :class:`ValueError`."""
        shard = cls(str(entry["file"]), int(entry["rows"]), int(entry["bytes"]), str(entry["sha256"]))
        if Path(shard.file).name != shard.file:
            raise ValueError(f"shard name {shard.file!r} is not a plain file name")
        return shard

    def check(self, folder: Path, *, digest: bool = False) -> Path:
        """The file.

        Raises:
            UserError: it is missing, has another size, or (with ``digest``) another content.
        """
        path = folder / self.file
        if not path.is_file():
            raise UserError(f"{path} is missing; {AGAIN}")
        size = path.stat().st_size
        if size != self.bytes:
            raise UserError(f"{path} has {size} bytes where trace.json says {self.bytes}; {AGAIN}")
        with reading(path):
            if digest and sha256(path) != self.sha256:
                raise UserError(f"{path} has changed: its SHA-256 is not the one in trace.json; {AGAIN}")
        return path


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
        notes: remarks that a reader of any figure made from this trace should see.
        shards: row files in order; ``files``: other files under checksum.
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
    notes: tuple[str, ...] = ()
    shards: tuple[Shard, ...] = ()
    files: tuple[Shard, ...] = ()
    complete: bool = False

    def to_json(self) -> dict[str, Any]:
        """A dictionary that ``from_json`` takes back."""
        return {"format": FORMAT, **asdict(self), "spec": self.spec.to_json()}

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
                notes=tuple(str(note) for note in data.get("notes", ())),
                shards=tuple(Shard.from_json(entry) for entry in data["shards"]),
                files=tuple(Shard.from_json(entry) for entry in data.get("files", ())),
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

    def card(self) -> str:
        """The dataset card, in Markdown, that makes the folder a data set of the Hugging Face hub as it is."""

        def text(values: Mapping[str, Any]) -> str:
            return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)

        spec, (name, _, _, columns) = self.spec, KINDS[self.kind]
        synthetic = "yes: generated from statistics, not recorded from a model" if self.synthetic else "no"
        requests = ["- config_name: requests", "  data_files:", "  - split: train", "    path: requests.parquet"]
        lines = [
            "---",
            "configs:",
            f"- config_name: {name}",
            "  default: true",
            "  data_files:",
            "  - split: train",
            f"    path: {name}-*.parquet",
            *(requests if self.kind == "tokens" else ()),
            "tags:",
            "- mixture-of-experts",
            "- expert-routing",
            "---",
            "",
            f"# Expert routing of {spec.name}" + (" (synthetic)" if self.synthetic else ""),
            "",
            columns,
            "",
            "| | |",
            "|---|---|",
            f"| model | {spec.name}: {spec.L} MoE layers, {spec.E} experts, top-{spec.K} |",
            f"| routing from | {text(self.source)} |",
            f"| prompts | {text(self.prompt_source) if self.prompt_source else 'unknown'} |",
            f"| seed | {'–' if self.seed is None else self.seed} |",
            *(f"| {key} | {value:,} |" for key, value in self.counts.items()),
            f"| synthetic | {synthetic} |",
            f"| settings | {text(self.settings) or '–'} |",
            f"| versions | {text(self.versions)} |",
            "",
            *(f"- {note}" for note in self.notes),
            "",
            "Written by moeless; `trace.json` holds the full description and the SHA-256 of every file.",
        ]
        return "\n".join(lines) + "\n"


def library_versions(*packages: str) -> dict[str, str]:
    """Installed versions of moeless and of those packages that are there."""
    found = {"moeless": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
