"""What code a kept result is of."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import moeless
from moeless.files import sha256

#: Parts of the package that present results and do not change them.
_PRESENTATION = ("report", "cli", "tracking", "experiments", "doctor.py", "__main__.py")


def code_files() -> list[Path]:
    """The sources that compute: the package without its presentation, and the experiments' jobs."""
    root = Path(moeless.__file__).parent
    files = [
        path
        for path in root.rglob("*.py")
        if not set(path.relative_to(root).parts[:1]) & set(_PRESENTATION) and "assets" not in path.parts
    ]
    # the linked folders: rglob does not follow links before Python 3.13
    for name in ("predictors", "placement", "experiments/cells"):
        files += (root / name).resolve().rglob("*.py")
    return sorted({path.resolve() for path in files})


@lru_cache(maxsize=1)
def code_hash() -> str:
    """Hash of the sources that compute."""
    lines = "".join(f"{sha256(path)}  {path.name}\n" for path in code_files())
    return hashlib.sha256(lines.encode()).hexdigest()
