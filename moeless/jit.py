"""``njit`` of numba where it is installed; elsewhere the same functions in plain Python, correct and far slower.

GPU machines often have torch and little else: profiles, live runs and their plans must work there too.

Numba keeps compiled functions in a cache that knows when a function's own file has changed, not when one has that it
calls or takes a number from. So functions are cached by the sources of their module and of all modules of this package
that it imports: after an update none is used that was compiled from older ones.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

try:
    import numba

    COMPILED = True
except ImportError:
    COMPILED = False

_PACKAGE = Path(__file__).parent
_IMPORT = re.compile(r"^\s*from (moeless[\w.]*) import (\([^)]*\)|[^\n]*)", re.MULTILINE)
#: Caches of other versions of a module that are kept: worktrees and branches come and go.
_KEPT = 2


def njit(*signature: Any, **options: Any) -> Callable[..., Any]:
    """As numba's, with ``cache=True`` by all sources; the function itself, with or without arguments, without numba."""
    if not COMPILED:
        return signature[0] if len(signature) == 1 and callable(signature[0]) else lambda function: function
    if len(signature) == 1 and callable(signature[0]):
        compiled: Callable[..., Any] = numba.njit(**options)(signature[0])  # noqa: TID251
        return compiled

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        given = numba.config.CACHE_DIR
        # numba looks where its cache is when it decorates; whoever sets NUMBA_CACHE_DIR keeps it as a root
        numba.config.CACHE_DIR = cache_folder(Path(function.__code__.co_filename), given) or given
        try:
            compiled: Callable[..., Any] = numba.njit(*signature, **options)(function)  # noqa: TID251
        finally:
            numba.config.CACHE_DIR = given
        return compiled

    return decorate


@cache
def cache_folder(path: Path, root: str = "") -> str:
    """Where the compiled functions of a source file are kept; empty where no such folder can be written.

    Args:
        root: in place of the ``__pycache__`` beside the file.
    """
    base = Path(root) if root else path.parent / "__pycache__"
    folder = base / f"{path.stem}-{sources_hash(path)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    except OSError:
        return ""
    if not os.access(folder, os.W_OK):
        return ""
    others = sorted(base.glob(f"{path.stem}-{'[0-9a-f]' * 16}"), key=lambda other: -other.stat().st_mtime)
    for other in [other for other in others if other != folder][_KEPT:]:
        shutil.rmtree(other, ignore_errors=True)
    return str(folder)


def sources_hash(path: Path) -> str:
    """Hash of a module's source and of all modules of this package that it imports, directly or not."""
    seen: dict[Path, bytes] = {}
    todo = [path]
    while todo:
        source = todo.pop()
        if source not in seen:
            seen[source], imported = _read(source)
            todo += imported
    lines = sorted(f"{source.name} {digest.hex()}" for source, digest in seen.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@cache
def _read(path: Path) -> tuple[bytes, tuple[Path, ...]]:
    """A source's hash, and the files of this package that it imports."""
    text = path.read_bytes()
    found: list[Path] = []
    for module, names in _IMPORT.findall(text.decode()):
        place = _PACKAGE.joinpath(*module.split(".")[1:])
        inside = [place / f"{name.split()[0]}.py" for name in names.strip("()").split(",") if name.split()]
        found += [file for file in (place.with_suffix(".py"), place / "__init__.py", *inside) if file.is_file()]
    return hashlib.sha256(text).digest(), tuple(found)


__all__ = ["COMPILED", "cache_folder", "njit", "sources_hash"]
