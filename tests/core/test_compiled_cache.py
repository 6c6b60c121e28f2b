"""Compiled functions are not used after a change of what they were compiled from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moeless import jit

#: A function that calls one of another module, both cached, in a package folder of their own.
OUTER = """
from moeless.jit import njit
from moeless.inner_of_test import inner

@njit(cache=True)
def outer(n):
    return inner(n) + 1
"""
INNER = """
from moeless.jit import njit

@njit(cache=True)
def inner(n):
    return n * {factor}
"""
PROGRAM = """
import sys
from pathlib import Path
import moeless
from moeless import jit

moeless.__path__.append(sys.argv[1])
jit._PACKAGE = Path(sys.argv[1])
from moeless.outer_of_test import outer
print(outer(10), sum(outer.stats.cache_hits.values()))
"""


def _run(folder: Path) -> list[str]:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=True, timeout=120
    )
    return ended.stdout.split()


@pytest.mark.skipif(not jit.COMPILED, reason="numba is not installed")
def test_a_changed_callee_is_compiled_anew(tmp_path: Path) -> None:
    (tmp_path / "outer_of_test.py").write_text(OUTER)
    (tmp_path / "inner_of_test.py").write_text(INNER.format(factor=2))
    assert _run(tmp_path) == ["21", "0"]
    assert _run(tmp_path) == ["21", "1"]
    (tmp_path / "inner_of_test.py").write_text(INNER.format(factor=3))
    assert _run(tmp_path) == ["31", "0"]


def test_hash_knows_imports_of_imports_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "_PACKAGE", tmp_path)
    (tmp_path / "part").mkdir()
    (tmp_path / "a.py").write_text("from moeless.part import (\n    b,\n)\n")
    (tmp_path / "part" / "b.py").write_text("from moeless.c import X\nfrom moeless.a import Y\n")
    (tmp_path / "c.py").write_text("X = 1\n")
    (tmp_path / "d.py").write_text("Z = 1\n")

    def found() -> str:
        jit._read.cache_clear()
        return jit.sources_hash(tmp_path / "a.py")

    first = found()
    (tmp_path / "d.py").write_text("Z = 2\n")
    assert found() == first
    (tmp_path / "c.py").write_text("X = 2\n")
    assert found() != first


def test_few_older_caches_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "kernels.py"
    for number in range(5):
        monkeypatch.setattr(jit, "sources_hash", lambda _, number=number: f"{number:016x}")
        jit.cache_folder.cache_clear()
        last = jit.cache_folder(source)
    kept = sorted(path.name for path in (tmp_path / "__pycache__").iterdir())
    assert Path(last).name in kept
    assert len(kept) == 1 + jit._KEPT
    jit.cache_folder.cache_clear()
