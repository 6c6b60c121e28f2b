"""Writing files so that a crash leaves the old content or the new, never half of one; reading what a user named.

Everything that is written gets the access rights that the process's umask and its folder (default ACL, set-group-id)
give to a new file, whatever the library that filled it prefers.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeless.errors import UserError

#: Errors of the file system that whoever runs the command can mend: rights, read-only mounts, names.
_USERS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR}


def check_writable(path: Path) -> None:
    """Refuse early, with a sentence, an output path that cannot be written.

    Raises:
        UserError: the nearest existing parent is not a writable folder.
    """
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    if parent != path.absolute() and not parent.is_dir():
        raise UserError(f"cannot write {path}: {parent} is a file, not a folder")
    if parent.is_file() and not may(os.W_OK, parent):
        raise UserError(f"cannot write {path}: it exists and is not writable")
    if parent.is_file():
        # a new file takes its place
        parent = parent.parent
    if parent.is_dir():
        # access rights alone do not tell (read-only mounts, root): try
        try:
            handle, name = tempfile.mkstemp(dir=parent, prefix=".moeless-")
        except OSError as error:
            raise UserError(f"cannot write {path}: {parent} is not writable ({error.strerror})") from error
        os.close(handle)
        os.unlink(name)


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary sibling, flush it to disk, then rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = sibling(path, ".partial")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        write(partial)
        # some libraries make files that only their owner can read
        partial.chmod(mode & 0o7777)
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sibling(path: Path, ending: str = "") -> Path:
    """A hidden name beside ``path`` that no other process on any machine chooses."""
    # names have at most 255 bytes
    return path.with_name(f".{path.name[:60]}-{secrets.token_hex(8)}{ending}")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, indented; NaN and infinities are refused."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing, cannot be read, or is not JSON.
    """
    try:
        with reading(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the file system's refusal to let an input be read into a sentence that names it.

    Libraries often raise such an error without the file's name.

    Raises:
        UserError: the file is missing, is a folder, or may not be read.
    """
    try:
        yield
    except FileNotFoundError as error:
        if not path.exists():
            raise UserError(f"{path} does not exist") from error
        # safetensors calls what it may not read missing
        if may(os.R_OK, path):
            raise
        raise UserError(f"cannot read {path}: {os.strerror(errno.EACCES).lower()}") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, a file is needed") from error
    except OSError as error:
        if not _users(error):
            raise
        raise UserError(f"cannot read {path}: {_reason(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of what a library says, or the error's name where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextmanager
def reading_whole(path: Path, what: str, *errors: type[Exception]) -> Iterator[None]:
    """As :func:`reading`; a library's ``errors`` over the content become ``PATH is not a whole WHAT (REASON)``.

    Raises:
        UserError: the file may not be read, or is broken.
    """
    try:
        with reading(path):
            yield
    except errors as error:
        raise UserError(f"{path} is not a whole {what} ({first_line(error)})") from None


def may(mode: int, path: Path) -> bool:
    """Whether access rights let this process read (``os.R_OK``) or write (``os.W_OK``) what is there."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def refusal(error: OSError) -> str | None:
    """A sentence for an error of the file system that whoever runs the command can mend; None for any other error."""
    if not _users(error):
        return None
    if error.filename is None:
        return f"a file cannot be read or written: {str(error).splitlines()[0]}"
    return f"cannot read or write {os.fsdecode(error.filename)}: {_reason(error)}"


def _users(error: OSError) -> bool:
    """Whether whoever runs the command can mend it; libraries raise ``PermissionError`` without a number, too."""
    return error.errno in _USERS or isinstance(error, PermissionError)


def _reason(error: OSError) -> str:
    number = errno.EACCES if error.errno is None and isinstance(error, PermissionError) else error.errno
    return os.strerror(number).lower() if number is not None else str(error).splitlines()[0]


@contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well, and vanishes otherwise.

    Raises:
        UserError: ``path`` exists and is not an empty folder, or cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} already exists; choose another --out or remove it first")
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = sibling(path)
    partial.mkdir()
    try:
        yield partial
        _open_to_readers(partial)
        if path.is_dir():
            path.rmdir()
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    """Give every file in a folder the rights that a new file gets there."""
    probe = sibling(folder / "probe")
    probe.touch(exist_ok=False)
    mode = probe.stat().st_mode & 0o7777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
