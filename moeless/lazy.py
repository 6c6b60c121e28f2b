"""Packages whose names are imported when they are first used, so that their light modules can be had alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def names(package: str, **modules: str) -> Callable[[str], Any]:
    """A package's ``__getattr__``: by module of the package, the names that it offers, separated by spaces."""
    home = {name: module for module, offered in modules.items() for name in offered.split()}

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return find
