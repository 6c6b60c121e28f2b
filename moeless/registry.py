"""Named, replaceable parts: built-in ones loaded on first use, others from Python entry points."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from moeless.errors import UserError


class Registry:
    """Parts of one kind by name.

    Args:
        kind: what a part is called in error messages.
        group: entry-point group that other packages extend, for example ``moeless.planners``.
        builtin: name to ``module:attribute``.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._targets = dict(builtin)
        self._loaded: dict[str, Any] = {}

    def names(self) -> list[str]:
        """Every known name, sorted."""
        return sorted({*self._targets, *self._loaded, *(point.name for point in entry_points(group=self.group))})

    def add(self, name: str, part: Any) -> None:
        """Register a part made at run time (notebooks, tests)."""
        self._loaded[name] = part

    def get(self, name: str) -> Any:
        """The part of that name.

        Raises:
            UserError: no part has that name.
        """
        if name in self._loaded:
            return self._loaded[name]
        if name in self._targets:
            module, _, attribute = self._targets[name].partition(":")
            part = getattr(importlib.import_module(module), attribute)
        else:
            points = [point for point in entry_points(group=self.group) if point.name == name]
            if not points:
                raise UserError(f"no {self.kind} is called {name!r}; there are: {', '.join(self.names())}")
            part = points[0].load()
        self._loaded[name] = part
        return part
