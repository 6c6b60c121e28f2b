"""Whether a live run fits into this machine's memory, and where the file with all experts goes.

Decided before ranks start, from what they will need and what there is: a process that writes where no room is left is
ended by a signal, and says nothing.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moeless.errors import UserError
from moeless.machine import available_bytes, file_system, free_bytes

#: Names a folder to be used in place of ``/dev/shm``.
VARIABLE = "MOELESS_SHM"
#: Left free in a folder: other programs keep small files there.
MARGIN_BYTES = 2**20
#: File systems without a disk: what lies in them takes memory.
IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Needs:
    """What a run needs on one machine, bytes.

    Attributes:
        experts: the file with all experts.
        memory: of the processes on top of that: programs, weights that are not experts', slots, messages.
        ranks: of this machine.
        scratch: files in the folder for temporary files.
    """

    experts: int
    memory: int
    ranks: int
    scratch: int = 0


@dataclass(frozen=True)
class Space:
    """What there is, bytes.

    Attributes:
        memory: available memory, within the control group's limit.
        shared, shared_free: the machine's memory file system; None where there is none.
        scratch, scratch_free: the folder for temporary files.
        shared_in_memory, scratch_in_memory: their files take memory.
    """

    memory: int
    shared: Path | None
    shared_free: int
    scratch: Path
    scratch_free: int
    shared_in_memory: bool = True
    scratch_in_memory: bool = False


def look() -> Space:
    """This machine as it is now."""
    shared = Path(os.environ.get(VARIABLE) or "/dev/shm")
    if os.environ.get(VARIABLE) and not shared.is_dir():
        raise UserError(f"{VARIABLE} names {shared}, which is not a folder")
    scratch = Path(tempfile.gettempdir())
    usable = shared.is_dir() and os.access(shared, os.W_OK)
    return Space(
        memory=available_bytes(),
        shared=shared if usable else None,
        shared_free=free_bytes(shared) if usable else 0,
        scratch=scratch,
        scratch_free=free_bytes(scratch),
        shared_in_memory=usable and file_system(shared) in IN_MEMORY,
        scratch_in_memory=file_system(scratch) in IN_MEMORY,
    )


def place(needs: Needs, space: Space) -> tuple[Path, str | None]:
    """The folder for the experts' file, and a warning where it is not the machine's memory file system.

    Raises:
        UserError: memory or folders have no room; with the figures and what to do.
    """
    scratch_holds = needs.experts + needs.scratch + MARGIN_BYTES <= space.scratch_free
    if needs.scratch + MARGIN_BYTES > space.scratch_free:
        raise UserError(
            f"the run's records need {_size(needs.scratch)} in {space.scratch}, which has {_size(space.scratch_free)} "
            "free; let TMPDIR name another folder"
        )
    holds = space.shared is not None and needs.experts + MARGIN_BYTES <= space.shared_free
    if space.shared is not None and holds:
        if _memory(needs, space.shared_in_memory) <= space.memory:
            return space.shared, None
        if space.scratch_in_memory or not scratch_holds or needs.memory > space.memory:
            raise UserError(_no_memory(needs, space, space.shared_in_memory))
        return space.scratch, (
            f"the experts' {_size(needs.experts)} in {space.shared} and {_size(needs.memory)} of the ranks are more "
            f"than the {_size(space.memory)} of memory that are available: the experts lie in {space.scratch}, which "
            "may be slower"
        )
    if not scratch_holds:
        first = f"{space.shared} has {_size(space.shared_free)} free and " if space.shared is not None else ""
        raise UserError(
            f"all experts together need {_size(needs.experts)} in a file that the ranks share; {first}{space.scratch} "
            f"has {_size(space.scratch_free)}: give the container a larger /dev/shm "
            f"(--shm-size {_size(needs.experts + 4 * MARGIN_BYTES, 'g')}), or let TMPDIR or {VARIABLE} name a local "
            "folder with more room"
        )
    if _memory(needs, space.scratch_in_memory) > space.memory:
        raise UserError(_no_memory(needs, space, space.scratch_in_memory))
    if space.shared is None:
        return space.scratch, None
    return space.scratch, (
        f"{space.shared} has {_size(space.shared_free)} free and all experts together need {_size(needs.experts)}: "
        f"they lie in {space.scratch}, which may be slower (Docker: --shm-size "
        f"{_size(needs.experts + 4 * MARGIN_BYTES, 'g')})"
    )


def _memory(needs: Needs, experts_too: bool) -> int:
    return needs.memory + (needs.experts if experts_too else 0)


def _no_memory(needs: Needs, space: Space, experts_too: bool) -> str:
    experts = f", {_size(needs.experts)} of them for the experts that all share" if experts_too else ""
    return (
        f"{needs.ranks} ranks need about {_size(_memory(needs, experts_too))} of memory{experts}; "
        f"{_size(space.memory)} are available: use fewer --ranks, a smaller model or --dtype bfloat16, or give the "
        "container more memory (Docker: --memory)"
    )


def _size(num_bytes: int, unit: str = "") -> str:
    """Bytes for a reader; ``g`` is whole gigabytes as Docker takes them, rounded up."""
    if unit == "g":
        return f"{-(-num_bytes // 2**30)}g"
    for scale, name in ((1e9, "GB"), (1e6, "MB")):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.{1 if name == 'GB' else 0}f} {name}"
    return f"{num_bytes / 1e3:,.0f} kB"
