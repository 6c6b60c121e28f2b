"""Options, each declared once: the command line, ``--config`` files, manifests, checks and search spaces read it there.

A *component* is a frozen dataclass whose fields are made with :func:`option`; a configuration inherits its components
and may give a field another default. Modules with components import nothing heavy, since ``--help`` imports them; names
that only annotations need are imported for the type checker alone, where ``kind`` or ``read`` says what is typed.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from moeless.errors import UserError

C = TypeVar("C", bound="Component")


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its field's name.

    Attributes:
        flag: as it is typed; ``--yes/--no`` for two words.
        help: one sentence, with the unit.
        kind: type on the command line, where it is not the field's; text, where there is ``read``. The option of a
            tuple may be repeated.
        minimum: the smallest value.
        choices: the values that exist; those of a field that is a ``Literal`` are known.
        metavar: stands for the value in ``--help``.
        read: turns what is typed into the field's value.
        show: turns the field's value, also as a manifest holds it, into what would be typed.
        live_key: the key in a live run's manifest, where it is not the field's name.
        group: heading in ``--help``; that of the component.
        default: on the command line; None where none is typed, ``unset`` then says what holds.
    """

    flag: str
    help: str
    kind: Any = None
    minimum: float | None = None
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    read: Callable[[Any], Any] | None = None
    show: Callable[[Any], Any] = lambda value: value
    live_key: str | None = None
    group: str | None = None
    default: Any = None
    unset: str = ""

    def check(self, value: Any) -> None:
        """Raise a ``UserError`` for a value below the minimum or none of the choices; None is no value."""
        if value is None:
            return
        if self.minimum is not None and not value >= self.minimum:
            raise UserError(f"{self.flag} must be at least {self.minimum:g}, got {value}")
        if self.choices and value not in self.choices:
            words = f"{', '.join(self.choices[:-1])} or {self.choices[-1]}"
            raise UserError(f"{self.flag} is {value!r}, it must be {words}")


def option(default: Any, flag: str, help: str, *, tune: tuple[Any, ...] = (), **more: Any) -> Any:
    """A dataclass field that is an option; ``more`` as in :class:`Option`, ``tune`` is the range that is searched."""
    metadata = {"option": Option(flag, help, **more)} | ({"tune": tune} if tune else {})
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Component:
    """Options that belong together, under one heading of ``--help``.

    Raises:
        UserError: a value is out of its range.
    """

    group: ClassVar[str | None] = None

    def __init_subclass__(cls, group: str | None = None) -> None:
        if group is not None:
            cls.group = group

    def __post_init__(self) -> None:
        for name, known in options(type(self)).items():
            if known.read is None:
                known.check(getattr(self, name))

    @classmethod
    def given(cls: type[C], values: Mapping[str, Any], **changes: Any) -> C:
        """A configuration from what was typed, by field name; None is the default, ``changes`` are the fields' own."""
        found = {}
        for name, known in options(cls).items():
            value = values.get(name)
            if value is not None and name not in changes:
                if known.read is not None:
                    known.check(value)
                    value = known.read(value)
                found[name] = tuple(value) if isinstance(value, list) else value
        return cls(**found, **changes)


@dataclass(frozen=True, kw_only=True)
class Seeded(Component):
    """Whatever draws random numbers."""

    seed: int = option(0, "--seed", "Seed of everything random.", minimum=0)


def options(component: Any) -> dict[str, Option]:
    """The options of a component and of those that it inherits, by field name."""
    found: dict[str, Option] = {}
    for base in reversed(component.__mro__):
        for name, field in getattr(base, "__dataclass_fields__", {}).items():
            if "option" in field.metadata and name not in found:
                found[name] = dataclasses.replace(field.metadata["option"], group=base.group, default=field.default)
    for name, known in found.items():
        field = component.__dataclass_fields__[name]
        texts = list[str] if isinstance(known.default, tuple) else str
        kind = known.kind or (texts if known.read is not None else _annotation(component, name))
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else known.choices
        if typing.get_origin(kind) is tuple:
            kind = list[typing.get_args(kind)[0]]  # type: ignore[misc]
        default = known.default if field.default is dataclasses.MISSING else field.default
        several, absent = isinstance(default, tuple), default in (None, dataclasses.MISSING)
        unset = ", ".join(map(str, default)) if several else "" if absent else str(default)
        typed = None if several or default is dataclasses.MISSING else known.show(default)
        found[name] = dataclasses.replace(known, kind=kind, choices=choices, default=typed, unset=unset)
    return found


def _annotation(component: Any, name: str) -> Any:
    """The type of a field, evaluated where it is declared."""
    home = next(base for base in component.__mro__ if name in inspect.get_annotations(base))
    return eval(component.__dataclass_fields__[name].type, vars(sys.modules[home.__module__]))


def inherited(component: type[Any], config: Any) -> dict[str, Any]:
    """The fields of a component that a configuration inherits, by name."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(component)}


def typed(printed: Mapping[str, Any], components: Sequence[type[Component]]) -> dict[str, Any]:
    """What one would type for a configuration as ``--dry-run`` and manifests hold it, by field name."""
    known = {name: found for component in components for name, found in options(component).items()}
    names = {found.live_key or name: name for name, found in known.items()} | {name: name for name in known}
    fixed = {field.name: field for component in components for field in dataclasses.fields(component)}
    values: dict[str, Any] = {}
    for key, value in printed.items():
        if key in names:
            values[names[key]] = known[names[key]].show(value)
        elif isinstance(value, dict):
            values |= typed(value, components)
        elif key not in fixed or value != fixed[key].default:
            values[key] = value
    return values


def check_backend(backends: Mapping[str, type[Component]], backend: str, values: Mapping[str, Any]) -> None:
    """Refuse options that only another backend has.

    Args:
        values: what was typed or defaults, by field name.

    Raises:
        UserError: names those that are not at their defaults.
    """
    own = options(backends[backend])
    for other, component in backends.items():
        foreign = [
            known.flag.split("/")[-1 if values[name] is False else 0]
            for name, known in options(component).items()
            if name not in own and values[name] != known.default
        ]
        if foreign:
            words = ", ".join(foreign[:-1]) + " and " * (len(foreign) > 1) + foreign[-1]
            raise UserError(f"{words} {'belongs' if len(foreign) == 1 else 'belong'} to --backend {other}")
