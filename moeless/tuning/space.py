"""Search spaces: which parameters a policy has, and between which values each is searched."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna

from moeless.errors import UserError
from moeless.placement import Planner
from moeless.serverless.keep_alive import KeepAlive
from moeless.simulator.options import BenchConfig

#: Options of a benchmark that are searched beside the planner's own parameters, with the kind of their values.
#: A keep-alive is a number of seconds, or the name of a policy.
SERVERLESS: dict[str, Any] = {
    "extra_slots": int,
    "keep_alive": KeepAlive,
    "scale_to_zero": bool,
    "replan_seconds": float,
}

Value = bool | int | float | str


@dataclass(frozen=True)
class Axis:
    """One searched parameter: numbers from ``low`` to ``high``, or one of ``choices``."""

    name: str
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    log: bool = False
    choices: tuple[Value, ...] = ()

    def __post_init__(self) -> None:
        if self.choices:
            return
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise UserError(
                f"the range of {self.name} must ascend between finite numbers, got {self.low:g}:{self.high:g}"
            )
        if self.log and self.low <= 0:
            raise UserError(f"the logarithmic range of {self.name} must begin above 0, got {self.low:g}")
        if self.whole and (self.low != int(self.low) or self.high != int(self.high)):
            raise UserError(f"{self.name} is a whole number; its range is {self.low:g}:{self.high:g}")

    def suggest(self, trial: optuna.Trial) -> Value:
        """A value for this trial."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        if self.whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def holds(self, value: Any) -> bool:
        """Whether a value lies on the axis."""
        if self.choices:
            return value in self.choices
        return isinstance(value, (int, float)) and self.low <= value <= self.high

    def to_json(self) -> dict[str, Any]:
        """The axis for manifests."""
        if self.choices:
            return {"choices": list(self.choices)}
        return {"low": self.low, "high": self.high, "whole": self.whole, "log": self.log}


def search_space(
    planner: Planner, defaults: Mapping[str, Value], ranges: Mapping[str, Axis | str]
) -> tuple[tuple[Axis, ...], tuple[str, ...]]:
    """Axes of a planner's parameters and of the serverless settings that concern it.

    A parameter's range is, in this order: the one in ``ranges``; ``metadata={"tune": (low, high[, "log"])}`` of
    its dataclass field; both values of a flag, all of a Literal; a fifth to five times a positive default,
    logarithmically. A number without any of these keeps its default.

    Args:
        defaults: current values of the settings in ``SERVERLESS``.
        ranges: axes by parameter name, as text or ready.

    Returns:
        The axes, and the parameters that are left at their defaults.

    Raises:
        UserError: a range is of no parameter, or nothing is left to search.
    """
    hints = typing.get_type_hints(planner.params)
    own = {field.name: (field, _kind(hints[field.name])) for field in dataclasses.fields(planner.params)}
    known = {field.name: field for field in dataclasses.fields(BenchConfig)}
    searched = own | {name: (known[name], SERVERLESS[name]) for name in SERVERLESS if _concerns(name, planner)}
    for name in ranges:
        if name not in searched:
            names = ", ".join(searched) or "none"
            raise UserError(f"planner {planner.name} has no parameter {name!r} to tune; there are: {names}")
    axes: list[Axis] = []
    left: list[str] = []
    for name, (field, kind) in searched.items():
        axis = _given(name, ranges, kind) or _of_field(name, field, kind)
        if axis is None:
            left.append(name)
        else:
            axes.append(axis)
    if not axes:
        raise UserError(f"planner {planner.name} has nothing to tune")
    return tuple(axes), tuple(left)


def _concerns(name: str, planner: Planner) -> bool:
    """Keep-alive matters where copies come and go by iteration, the interval where plans are made by it."""
    if planner.cadence == "once" and not planner.needs_forecast:
        return False
    only = {"keep_alive": "iteration", "scale_to_zero": "iteration", "replan_seconds": "interval"}
    return planner.cadence == only.get(name, planner.cadence)


def _kind(hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if option is not type(None)), float)


def _of_field(name: str, field: dataclasses.Field[Any], kind: Any) -> Axis | None:
    if "tune" in field.metadata:
        low, high, *log = field.metadata["tune"]
        return Axis(name, low, high, whole=kind is int, log="log" in log)
    if kind is bool:
        return Axis(name, choices=(False, True))
    if typing.get_origin(kind) is typing.Literal:
        return Axis(name, choices=typing.get_args(kind))
    default = field.default
    if kind not in (int, float) or not isinstance(default, (int, float)) or default <= 0:
        return None
    if kind is int:
        return Axis(name, max(1, default // 5), max(2, default * 5), whole=True, log=True)
    return Axis(name, default / 5, default * 5, log=True)


def _given(name: str, ranges: Mapping[str, Axis | str], kind: Any) -> Axis | None:
    given = ranges.get(name)
    if given is None or isinstance(given, Axis):
        return given
    return _parse(name, given, kind)


def _parse(name: str, text: str, kind: Any) -> Axis:
    parts = text.split(":")
    if len(parts) == 1 or (kind is KeepAlive and "," in text):
        return Axis(name, choices=tuple(_value(name, part, kind) for part in text.split(",")))
    log = parts[2:] == ["log"]
    if len(parts) > 3 or (len(parts) == 3 and not log) or kind not in (int, float, KeepAlive):
        raise UserError(f"range {name}={text} is not of the form low:high, low:high:log or a,b,c")
    low, high = (float(_value(name, part, float)) for part in parts[:2])
    return Axis(name, low, high, whole=kind is int, log=log)


def _value(name: str, text: str, kind: Any) -> Value:
    if kind is KeepAlive:
        asked = KeepAlive.parse(text)
        return asked.seconds if asked.kind == "fixed" else text
    words = {"true": True, "false": False}
    if kind is bool or text.lower() in words:
        if text.lower() in words:
            return words[text.lower()]
        raise UserError(f"{name} is true or false, not {text!r}")
    if kind in (int, float):
        try:
            number: Value = kind(text)
        except ValueError:
            raise UserError(f"{name} takes {'whole numbers' if kind is int else 'numbers'}, not {text!r}") from None
        return number
    return text


def parse_ranges(texts: Iterable[str]) -> dict[str, Axis | str]:
    """``name=low:high[:log]`` and ``name=a,b,c`` texts by name.

    Raises:
        UserError: a text has not that form.
    """
    found: dict[str, Axis | str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UserError(f"range {text!r} is not of the form name=low:high, name=low:high:log or name=a,b,c")
        found[name.strip().replace("-", "_")] = value.strip()
    return found
