"""Planner parameters from text or JSON, checked against the planner's dataclass."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from moeless.errors import UserError
from moeless.placement.base import Planner


def make_params(planner: Planner, values: Mapping[str, Any]) -> Any:
    """The planner's parameters with ``values`` in place of defaults; text is read as the field's type.

    Raises:
        UserError: a name is no parameter of the planner, or a value is of the wrong kind.
    """
    hints = typing.get_type_hints(planner.params)
    known = [field.name for field in dataclasses.fields(planner.params)]
    read: dict[str, Any] = {}
    for name, value in values.items():
        key = name.replace("-", "_")
        if key not in known:
            offered = f"there are: {', '.join(known)}" if known else "it has none"
            raise UserError(f"planner {planner.name!r} has no parameter {name!r}; {offered}")
        read[key] = _read(hints[key], value, f"parameter {name!r} of planner {planner.name!r}")
    return planner.params(**read)


def parse_assignments(texts: Iterable[str]) -> dict[str, str]:
    """``name=value`` texts as a dictionary.

    Raises:
        UserError: a text has not that form.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UserError(f"{text!r} is not of the form name=value")
        found[name.strip()] = value.strip()
    return found


def _read(hint: Any, value: Any, what: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and (value is None or str(value).lower() == "none"):
        return None
    kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise UserError(f"{what} must be one of {', '.join(map(str, choices))}, got {value!r}")
        return value
    if kind is bool:
        words = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
        if str(value).lower() not in words:
            raise UserError(f"{what} must be true or false, got {value!r}")
        return words[str(value).lower()]
    try:
        number = kind(value)
    except (TypeError, ValueError):
        number = None
    if number is None or (kind is float and number != number) or (kind is int and float(value) != number):
        wanted = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise UserError(f"{what} must be {wanted}, got {value!r}")
    return number
