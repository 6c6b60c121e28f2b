"""``njit`` of numba where it is installed; elsewhere the same functions in plain Python, correct and far slower.

GPU machines often have torch and little else: profiles, live runs and their plans must work there too.

Compiled functions are kept in the user's cache folder (``NUMBA_CACHE_DIR`` where that is set), never inside the
package: an uninstalled or replaced version leaves nothing behind that Python could import. Where no cache folder can be
written, a folder of this user among temporary files serves.

Numba keeps compiled functions in a cache that knows when a function's own file has changed, not when one has that it
calls or takes a number from. So functions are cached by the sources of their module and of all modules of this package
that it imports: after an update none is used that was compiled from older ones.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, overload

#: Whether numba is installed; it is imported when the first module with compiled functions is.
COMPILED = importlib.util.find_spec("numba") is not None

P = ParamSpec("P")
R = TypeVar("R")

_PACKAGE = Path(__file__).parent
_IMPORT = re.compile(r"^\s*from (moeless[\w.]*) import (\([^)]*\)|[^\n]*)", re.MULTILINE)
#: Tells processes of machines that share a folder apart.
_MACHINE = uuid.uuid4().hex[:8]
#: Caches of other versions of a module that are kept: worktrees, branches and releases come and go.
_KEPT = 4
#: What is called, once, when a function has to be compiled because no cache holds it.
_remark: Callable[[], None] | None = None


@overload
def njit(function: Callable[P, R], /) -> Callable[P, R]: ...


@overload
def njit(
    *signature: Any, allocates: bool = True, inner: bool = False, **options: Any
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def njit(*signature: Any, allocates: bool = True, inner: bool = False, **options: Any) -> Any:
    """As numba's, with ``cache=True`` by all sources; the function itself, with or without arguments, without numba.

    Args:
        allocates: False for a function that makes no arrays. It does not count references to those it is given, which
            would take longer than a step of a short loop, and as much again to compile.
        inner: True for a function that only compiled code calls. What Python would need to call it is not compiled.
    """
    if not COMPILED:
        return signature[0] if len(signature) == 1 and callable(signature[0]) else lambda function: function
    import numba

    # said either way: what is not said, numba takes from whoever first calls the function
    options["_nrt"] = allocates
    if inner:
        options |= {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    _listen()
    if len(signature) == 1 and callable(signature[0]):
        compiled: Callable[..., Any] = numba.njit(**options)(signature[0])  # noqa: TID251
        return compiled

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        given = numba.config.CACHE_DIR
        folder = cache_folder(Path(function.__code__.co_filename))
        # numba looks where its cache is when it decorates
        numba.config.CACHE_DIR = folder or given
        wanted = options if folder else {**options, "cache": False}
        try:
            compiled: Callable[..., Any] = numba.njit(*signature, **wanted)(function)  # noqa: TID251
        finally:
            numba.config.CACHE_DIR = given
        if wanted.get("cache"):
            _own_names(compiled)
        if inner:
            kind: Any = type(compiled)
            compiled.__class__ = _inner_class(kind)
        return compiled

    return decorate


@cache
def _inner_class(kind: type[Any]) -> type[Any]:
    """A compiled function's class for one that Python must not call: there is no machine code for that."""

    def refuse(self: Any, *_: Any, **__: Any) -> Any:
        raise TypeError(f"{self.py_func.__name__} is called by compiled code only; from Python, use its py_func")

    return type("InnerFunction", (kind,), {"__call__": refuse})


def _own_names(compiled: Any) -> None:
    """Have each process name the files that it adds to the cache.

    Numba numbers them by what the index held when it looked. Of two processes that compile a function for different
    types at one time both take the same number, and the index then gives one the machine code of the other.
    """
    file = compiled._cache._cache_file
    base: Callable[[int], str] = file._data_name

    def name(number: int) -> str:
        stem, _, ending = base(number).rpartition(".")
        return f"{stem}-{_MACHINE}-{os.getpid()}.{ending}"

    file._data_name = name


@cache
def cache_folder(path: Path) -> str:
    """Where the compiled functions of a source file are kept; empty where no folder at all can be written."""
    root = cache_root()
    if root is None:
        return ""
    inside = path.is_relative_to(_PACKAGE)
    name = ".".join(path.relative_to(_PACKAGE).with_suffix("").parts) if inside else path.stem
    folder = root / f"{name}-{sources_hash(path)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    except OSError:
        return ""
    others = sorted(root.glob(f"{name}-{'[0-9a-f]' * 16}"), key=_age)
    for other in [other for other in others if other != folder][_KEPT:]:
        shutil.rmtree(other, ignore_errors=True)
    return str(folder)


def _age(folder: Path) -> float:
    try:
        return -folder.stat().st_mtime
    except OSError:
        # another process removed it
        return 0.0


@lru_cache(maxsize=1)
def cache_root() -> Path | None:
    """The folder that holds all compiled functions of this package; None where none can be written."""
    chosen = _chosen_root()
    if chosen is not None:
        try:
            chosen.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=chosen).close()
            return chosen
        except OSError:
            pass
    return _temporary_root()


def _chosen_root() -> Path | None:
    """The folder that the environment names, otherwise the user's own; None for a user without a home folder."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    if given:
        return Path(given).absolute() / "moeless"
    try:
        from platformdirs import user_cache_path

        path = user_cache_path("moeless")
    except (ImportError, RuntimeError):
        # a GPU machine with little else than torch, or a user without a home folder and a password entry
        return None
    # without a home folder the name may also be a relative one
    return path / "compiled" if path.is_absolute() else None


def _temporary_root() -> Path | None:
    """A folder among temporary files that only this user can write: what it holds is run."""
    try:
        path = Path(tempfile.gettempdir()) / f"moeless-compiled-{os.getuid()}"
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return None
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return path if ours else None


@dataclass(frozen=True)
class CompiledCache:
    """The compiled functions on disk: their folder, how many files and bytes; no folder where none can be written."""

    path: Path | None
    files: int
    bytes: int


def compiled_cache() -> CompiledCache:
    """What is kept on disk now."""
    root = cache_root()
    sizes = [path.stat().st_size for path in root.rglob("*") if path.is_file()] if root else []
    return CompiledCache(root, len(sizes), sum(sizes))


def clear_cache() -> CompiledCache:
    """Remove all compiled functions; returns what there was. Other processes compile theirs again when they start."""
    before = compiled_cache()
    if before.path is not None:
        shutil.rmtree(before.path, ignore_errors=True)
        cache_folder.cache_clear()
    return before


def on_compiling(remark: Callable[[], None]) -> None:
    """Have ``remark`` called once, before the first function that no cache holds is compiled in this process."""
    global _remark
    _remark = remark


@lru_cache(maxsize=1)
def _listen() -> None:
    from numba.core import event

    class Listener(event.Listener):
        def on_start(self, _event: Any) -> None:
            global _remark
            remark, _remark = _remark, None
            if remark is not None:
                remark()

        def on_end(self, _event: Any) -> None:
            return

    event.register("numba:compile", Listener())


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


__all__ = [
    "COMPILED",
    "CompiledCache",
    "cache_folder",
    "cache_root",
    "clear_cache",
    "compiled_cache",
    "njit",
    "on_compiling",
    "sources_hash",
]
