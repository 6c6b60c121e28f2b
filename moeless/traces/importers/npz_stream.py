"""Arrays of an NPZ archive, read in slices along their first axis: neither pickles nor whole arrays."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from moeless.errors import UserError
from moeless.files import first_line, reading_whole

#: Bytes of an array's header at most; a plain array's has about 100.
_HEADER_BYTES = 10_000


@contextmanager
def open_npz(path: Path, layout: str) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever is wrong with its bytes becomes a sentence.

    Raises:
        UserError: the file is missing, cut short, changed, or no NPZ; ``layout`` says what it must hold.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; an NPZ file with {layout} is needed")
    with _reading(path):
        with path.open("rb") as head:
            if head.read(6) == b"\x93NUMPY":
                raise UserError(f"{path} is not an NPZ archive; it must hold {layout}")
        archive = zipfile.ZipFile(path)
    with archive:
        yield archive


def _reading(path: Path) -> AbstractContextManager[None]:
    # the last two are zipfile's errors for an unknown compression and for a password
    errors = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError)
    return reading_whole(path, "NPZ archive", *errors)


class ArrayStream:
    """One array of the archive; :meth:`take` reads its next rows.

    An array in Fortran order cannot be cut along its first axis while it streams: it is read whole.

    Raises:
        UserError: the array holds Python objects, or its bytes are not what its header says.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, name: str) -> None:
        self.path, self.name = path, name
        member = archive.getinfo(f"{name}.npy")
        with _reading(path):
            self._handle: IO[bytes] = archive.open(member)
            self._header(member)
        self._whole: NDArray[Any] | None = None
        content = math.prod(self.shape) * self.dtype.itemsize
        if self._fortran and len(self.shape) > 1:
            self._whole = np.frombuffer(self._read(content), self.dtype).reshape(self.shape, order="F")
        self._taken = 0

    def _header(self, member: zipfile.ZipInfo) -> None:
        try:
            version = npy.read_magic(self._handle)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
            if read is None:
                raise ValueError(f"version {version}")
            self.shape, self._fortran, self.dtype = read(self._handle, max_header_size=_HEADER_BYTES)
        except ValueError as error:
            raise UserError(
                f"{self.path} cannot be read as NPZ: {self.name} has no plain header ({first_line(error)})"
            ) from None
        if self.dtype.hasobject:
            raise UserError(f"{self.path} holds pickled Python objects, which are not read; save plain arrays")
        content = math.prod(self.shape) * self.dtype.itemsize
        if member.file_size != self._handle.tell() + content:
            raise UserError(f"{self.path} cannot be read as NPZ: {self.name} has not the size that its header says")

    def _read(self, size: int) -> bytes:
        with _reading(self.path):
            content = self._handle.read(size)
        if len(content) != size:
            raise UserError(f"{self.path} is not a whole NPZ archive ({self.name} ends early)")
        return content

    def __len__(self) -> int:
        return int(self.shape[0]) if self.shape else 0

    def take(self, rows: int) -> NDArray[Any]:
        """The next ``rows`` rows.

        Raises:
            UserError: the array ends before.
        """
        shape = (rows, *self.shape[1:])
        if self._whole is not None:
            part = self._whole[self._taken : self._taken + rows]
            self._taken += rows
            return part
        return np.frombuffer(self._read(math.prod(shape) * self.dtype.itemsize), self.dtype).reshape(shape)
