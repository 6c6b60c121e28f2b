"""Reading hardware profiles: every field checked, one sentence on the first thing that is wrong.

``docs/profiling.md`` describes the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeless.contracts import FloatArray
from moeless.costs.profile import SHAPES, Curve, Exchange, ExpertGrid, HardwareProfile
from moeless.errors import UserError
from moeless.files import read_json

FORMAT = 1
KIND = "hardware-profile"

#: Where profiles that come with the package lie.
SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "profiles"

#: Every top-level field; all are required.
FIELDS = (
    "format",
    "kind",
    "name",
    "created",
    "program",
    "machine",
    "model",
    "ceilings",
    "default_kernel",
    "default_dtype",
    "experts",
    "parts",
    "copies",
    "overlap",
    "exchange",
    "links",
    "control",
)
#: Curves over tokens that a profile must have.
PARTS = ("router", "attention", "permute", "combine")


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.json") if path.stem != "links")


def find_profile(name: str | Path) -> Path:
    """A profile's file, from a path or the name of a shipped one.

    Raises:
        UserError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = SHIPPED / f"{name}.json"
    if "/" not in str(name) and str(name) != "links" and shipped.is_file():
        return shipped
    known = ", ".join(shipped_profiles()) or "none"
    raise UserError(f"{name} is neither a profile's file nor the name of a shipped one; shipped: {known}")


def load_profile(name: str | Path) -> HardwareProfile:
    """Read and check a profile.

    Raises:
        UserError: it is missing, cut off, of another version, or holds times that cannot be.
    """
    path = find_profile(name)
    return parse_profile(read_json(path), str(path))


def parse_profile(data: Any, path: str) -> HardwareProfile:
    """Check a profile's JSON.

    Raises:
        UserError: with one sentence on the first thing that is wrong.
    """
    check = _Check(path)
    top = check.mapping(data, "the file")
    if top.get("kind") != KIND:
        raise UserError(f"{path} is not a hardware profile (its kind is {top.get('kind')!r}, not {KIND!r})")
    if top.get("format") != FORMAT:
        raise UserError(f"profile {path} has format {top.get('format')!r}, this version reads format {FORMAT}")
    missing = [name for name in FIELDS if name not in top]
    unknown = [name for name in top if name not in FIELDS]
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has the unknown field {', '.join(unknown)}"
        raise UserError(f"profile {path} {what}; it is incomplete or of another program")
    model = check.mapping(top["model"], "model")
    for key in ("name", "num_experts", "top_k", *SHAPES):
        if key not in model:
            raise UserError(f"profile {path}: model lacks {key}")
    machine = check.mapping(top["machine"], "machine")
    if not isinstance(machine.get("name"), str):
        raise UserError(f"profile {path}: machine lacks its name")
    experts = tuple(check.grid(entry, index) for index, entry in enumerate(check.sequence(top["experts"], "experts")))
    parts = {
        name: check.curve(entry, f"parts.{name}", "tokens")
        for name, entry in check.mapping(top["parts"], "parts").items()
    }
    absent = [name for name in PARTS if name not in parts]
    if absent:
        raise UserError(f"profile {path}: parts lacks {', '.join(absent)}")
    copies = {
        name: check.curve(entry, f"copies.{name}", "bytes")
        for name, entry in check.mapping(top["copies"], "copies").items()
    }
    exchange = tuple(
        check.exchange(entry, f"exchange[{index}]")
        for index, entry in enumerate(check.sequence(top["exchange"], "exchange"))
    )
    links = top["links"]
    if links is not None and not isinstance(links, str):
        raise UserError(f"profile {path}: links must be the name of a link model or null")
    control = check.mapping(top["control"], "control")
    dispatch, plan = (
        {
            str(planner): check.positive(seconds, f"control.{name}.{planner}")
            for planner, seconds in check.mapping(control.get(name, {}), f"control.{name}").items()
        }
        for name in ("dispatch_seconds", "plan_seconds")
    )
    profile = HardwareProfile(str(top["name"]), path, experts, parts, copies, exchange, links, dispatch, plan, top)
    profile.grid()
    return profile


@dataclass(frozen=True)
class _Check:
    """Typed access to the JSON, with the file's name in every complaint."""

    path: str

    def fail(self, what: str) -> UserError:
        return UserError(f"profile {self.path}: {what}")

    def mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.fail(f"{where} must be an object")
        return value

    def sequence(self, value: Any, where: str) -> Sequence[Any]:
        if not isinstance(value, list):
            raise self.fail(f"{where} must be a list")
        return value

    def positive(self, value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value) or value <= 0:
            raise self.fail(f"{where} must be a positive number, got {value!r}")
        return float(value)

    def numbers(self, value: Any, where: str) -> FloatArray:
        return np.array([self.positive(v, f"{where}[{i}]") for i, v in enumerate(self.sequence(value, where))])

    def ascending(self, value: Any, where: str, strict: bool) -> FloatArray:
        array = self.numbers(value, where)
        if not len(array):
            raise self.fail(f"{where} is empty")
        step = np.diff(array)
        if (step <= 0).any() if strict else (step < 0).any():
            raise self.fail(f"{where} must {'ascend' if strict else 'not descend'}")
        return array

    def curve(self, value: Any, where: str, axis: str) -> Curve:
        entry = self.mapping(value, where)
        x = self.ascending(entry.get(axis), f"{where}.{axis}", strict=True)
        seconds = self.ascending(entry.get("seconds"), f"{where}.seconds", strict=False)
        if len(x) != len(seconds):
            raise self.fail(f"{where} has {len(x)} {axis} and {len(seconds)} times")
        return Curve(x, seconds)

    def exchange(self, value: Any, where: str) -> Exchange:
        entry = self.mapping(value, where)
        ranks = entry.get("ranks")
        if not isinstance(ranks, int) or ranks < 2:
            raise self.fail(f"{where}.ranks must be a whole number of at least 2")
        uniform = self.curve(entry, where, "bytes")
        hot = Curve(uniform.x, self.ascending(entry.get("hot_seconds"), f"{where}.hot_seconds", strict=False))
        if len(hot.seconds) != len(hot.x) or (hot.seconds > uniform.seconds * (1 + 1e-12)).any():
            raise self.fail(f"{where}: hot_seconds must be as many as bytes, none above the even exchange's")
        gather = self.positive(entry.get("gather_seconds"), f"{where}.gather_seconds")
        expert, rest = None, None
        if "engine" in entry:
            engine = self.mapping(entry["engine"], f"{where}.engine")
            expert, rest = (
                self.curve(
                    {"tokens": engine.get("tokens"), "seconds": engine.get(f"{name}_seconds")},
                    f"{where}.engine.{name}",
                    "tokens",
                )
                for name in ("expert", "rest")
            )
        return Exchange(ranks, str(entry.get("backend")), uniform, hot, gather, expert, rest)

    def grid(self, value: Any, index: int) -> ExpertGrid:
        where = f"experts[{index}]"
        entry = self.mapping(value, where)
        tokens = self.ascending(entry.get("tokens"), f"{where}.tokens", strict=True)
        active = self.ascending(entry.get("active"), f"{where}.active", strict=True)
        if tokens[0] != 1 or active[0] != 1 or len(tokens) < 2:
            raise self.fail(f"{where}: tokens and active experts must begin at 1, and tokens have two values or more")
        rows = [
            self.numbers(row, f"{where}.seconds[{i}]")
            for i, row in enumerate(self.sequence(entry.get("seconds"), where))
        ]
        if len(rows) != len(active) or any(len(row) != len(tokens) for row in rows):
            raise self.fail(f"{where}.seconds must be {len(active)} rows of {len(tokens)} times")
        seconds = np.stack(rows)
        slack = 1e-9 * seconds.max()
        mixed = np.diff(np.diff(seconds, axis=0), axis=1)
        if (np.diff(seconds, axis=0) < -slack).any() or (np.diff(seconds, axis=1) < -slack).any():
            raise self.fail(f"{where}.seconds fall where tokens or active experts rise")
        if (mixed < -slack).any():
            raise self.fail(f"{where}.seconds: an added token costs less with more experts active")
        error = self.mapping(entry.get("leave_one_out"), f"{where}.leave_one_out")
        loo = {str(key): float(number) for key, number in error.items()}
        return ExpertGrid(str(entry.get("kernel")), str(entry.get("dtype")), tokens, active, seconds, loo)
