"""Journal files: the lock that their writers share, a last line that a killed writer left unfinished."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Literal

from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileOpenLock

from moeless.errors import UserError
from moeless.files import check_writable
from moeless.machine import file_system

LockKind = Literal["kernel", "file"]

#: File systems of one machine, whose kernel sees every process that locks a file. On all others processes of several
#: machines may write, and the kernel's lock may hold on each of them alone.
_LOCAL = {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "rootfs", "tmpfs"}
_LOCAL |= {"xfs", "zfs"}
#: How a line of a journal begins.
_LINE = b'{"op_code":'
_BLOCK = 1 << 16


class KernelLock:
    """A lock on the journal itself, which the kernel lets go when its process dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = -1

    def acquire(self) -> bool:
        """Wait for the lock."""
        handle = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        return True

    def release(self) -> None:
        """Let it go."""
        os.close(self._handle)


class WholeLines:
    """Another lock, under which the journal always ends with a whole line: what is appended begins one of its own."""

    def __init__(self, path: Path, lock: KernelLock | JournalFileOpenLock) -> None:
        self._path = path
        self.lock = lock

    def acquire(self) -> bool:
        """Wait for the lock, then drop the line that a killed writer left unfinished."""
        self.lock.acquire()
        try:
            _trim(self._path)
        except BaseException:
            self.lock.release()
            raise
        return True

    def release(self) -> None:
        """Let it go."""
        self.lock.release()


def open_journal(where: str) -> BaseJournalBackend:
    """The journal at a path, made where it is missing.

    ``?lock=kernel`` or ``?lock=file`` behind the path replaces the lock that :func:`lock_kind` chooses.

    Raises:
        UserError: it is a folder or cannot be written, or there is no such lock.
    """
    name, given, kind = where.partition("?lock=")
    if given and kind not in ("kernel", "file"):
        raise UserError(f"no lock of a journal is called {kind!r}; there are: kernel, file")
    # links to one journal lead to one lock
    path = Path(name).expanduser().resolve()
    if path.is_dir():
        raise UserError(f"the study's storage {path} is a folder; name a file, or a database URL")
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = KernelLock(path) if (kind or lock_kind(path)) == "kernel" else JournalFileOpenLock(str(path))
    return JournalFileBackend(str(path), WholeLines(path, lock))


def lock_kind(path: Path) -> LockKind:
    """How the processes that share a journal take turns; the file system decides, so that all of them agree.

    ``kernel`` is ``flock``: a killed process never leaves it behind. It does not reach other machines on every network
    file system. ``file`` is Optuna's lock file beside the journal: it does, but after a process was killed while it
    held the lock, the next one waits half a minute for it.
    """
    return "kernel" if file_system(path) in _LOCAL else "file"


def _trim(path: Path) -> None:
    """Cut an unfinished last line off; readers never took notice of it.

    Raises:
        UserError: the line is none of a journal, so the file is left as it is.
    """
    with path.open("r+b") as journal:
        end = start = journal.seek(0, os.SEEK_END)
        tail = b""
        while start > 0 and b"\n" not in tail:
            block = min(_BLOCK, start)
            start = journal.seek(start - block)
            tail = journal.read(block) + tail
        torn = tail.rpartition(b"\n")[2]
        if not torn:
            return
        # a machine that went down may have left zeros
        begun = torn.rstrip(b"\0")
        if begun[: len(_LINE)] != _LINE[: len(begun)]:
            raise UserError(f"the study's storage {path} is not a journal of studies; name another file")
        journal.truncate(end - len(torn))
