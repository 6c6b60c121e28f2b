"""Print the constraints file with torch held at the version that is installed, so that pip keeps it."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main(constraints: Path) -> int:
    """Write to standard output; status 1 with a sentence where there is no torch."""
    try:
        found = version("torch")
    except PackageNotFoundError:
        print(
            f"TORCH=system, but {sys.executable} finds no torch. Install it there first "
            "(https://pytorch.org/get-started/locally/), or leave TORCH=system out.",
            file=sys.stderr,
        )
        return 1
    for line in constraints.read_text(encoding="utf-8").splitlines():
        # triton belongs to the torch that brings it
        if line.split("==")[0].strip() not in ("torch", "triton"):
            print(line)
    print(f"torch=={found}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
