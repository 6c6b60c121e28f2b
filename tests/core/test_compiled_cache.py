"""Compiled functions lie in the user's cache folder and are not used after a change of what they were compiled from."""

from __future__ import annotations

import os
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
#: Compiles a function for 1 while another process, which looked into the cache at the same time, does so for 1.5.
RACE = """
import os
import subprocess
import sys
from pathlib import Path
import moeless
from moeless import jit

moeless.__path__.append(sys.argv[1])
jit._PACKAGE = Path(sys.argv[1])
from moeless.inner_of_test import inner
from numba.core.caching import IndexDataCacheFile as File

if "first" in sys.argv:
    save = File._save_data

    def after_the_other(self, name, data):
        subprocess.run([sys.executable, *sys.orig_argv[1:-1], "second"], check=True)
        save(self, name, data)

    File._save_data = after_the_other
if "second" in sys.argv:
    File._load_index = lambda self: {}
print(inner(1 if "first" in sys.argv else 1.5))
"""


compiles = pytest.mark.skipif(not jit.COMPILED, reason="numba is not installed")


def _run(folder: Path, *words: str, program: str = PROGRAM, **environment: str) -> list[str]:
    """What a program prints: the value, and how many functions came from the cache."""
    kept = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "TMPDIR")}
    ended = subprocess.run(
        [sys.executable, "-c", program, str(folder), *words],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return ended.stdout.split()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a module whose compiled function calls another module's."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "outer_of_test.py").write_text(OUTER)
    (folder / "inner_of_test.py").write_text(INNER.format(factor=2))
    return folder


@compiles
def test_a_changed_callee_is_compiled_anew(package: Path, tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    assert _run(package, HOME=home) == ["21", "0"]
    assert _run(package, HOME=home) == ["21", "1"]
    (package / "inner_of_test.py").write_text(INNER.format(factor=3))
    assert _run(package, HOME=home) == ["31", "0"]


@compiles
@pytest.mark.parametrize(
    ("variable", "place"), [("HOME", ".cache/moeless"), ("XDG_CACHE_HOME", "moeless"), ("NUMBA_CACHE_DIR", "moeless")]
)
def test_compiled_functions_lie_in_the_users_cache_and_never_in_the_package(
    package: Path, tmp_path: Path, variable: str, place: str
) -> None:
    chosen = tmp_path / "chosen"
    _run(package, HOME=str(tmp_path / "home"), **({} if variable == "HOME" else {variable: str(chosen)}))
    base = tmp_path / "home" if variable == "HOME" else chosen
    assert list((base / place).rglob("*.nbi"))
    # Python's own compiled modules are listed with their package and removed with it
    assert {path.suffix for path in package.rglob("*") if path.is_file()} <= {".py", ".pyc"}


@compiles
def test_processes_that_compile_a_function_at_one_time_do_not_mix_up_its_types(package: Path, tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    assert _run(package, "first", program=RACE, HOME=home)[-1] == "2"
    assert _run(package, "again", program=RACE, HOME=home) == ["3.0"]


@compiles
def test_without_a_home_folder_a_private_temporary_one_serves(package: Path, tmp_path: Path) -> None:
    # nobody, not even root, can make a folder below /proc
    nowhere = {"HOME": "/proc/nowhere", "TMPDIR": str(tmp_path)}
    assert _run(package, **nowhere) == ["21", "0"]
    assert _run(package, **nowhere) == ["21", "1"]
    private = tmp_path / f"moeless-compiled-{os.getuid()}"
    assert private.stat().st_mode & 0o777 == 0o700
    # what others can write is not run: compiled each time instead
    private.chmod(0o777)
    assert _run(package, **nowhere) == ["21", "0"]


def test_a_user_without_home_and_password_entry_has_a_temporary_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home(_: str) -> Path:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_path", no_home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    jit.cache_root.cache_clear()
    try:
        assert jit.cache_root() == tmp_path / f"moeless-compiled-{os.getuid()}"
    finally:
        jit.cache_root.cache_clear()


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


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of compiled functions of this test."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    jit.cache_root.cache_clear()
    jit.cache_folder.cache_clear()
    yield tmp_path / "cache" / "moeless"
    monkeypatch.undo()
    jit.cache_root.cache_clear()
    jit.cache_folder.cache_clear()


def test_few_older_caches_are_kept(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "kernels.py"
    for number in range(8):
        monkeypatch.setattr(jit, "sources_hash", lambda _, number=number: f"{number:016x}")
        jit.cache_folder.cache_clear()
        last = jit.cache_folder(source)
    kept = sorted(path.name for path in root.iterdir())
    assert Path(last).name in kept
    assert len(kept) == 1 + jit._KEPT


def test_modules_of_one_name_have_caches_of_their_own(root: Path) -> None:
    folders = {jit.cache_folder(jit._PACKAGE / part / "base.py") for part in ("costs", "placement", "predictors")}
    assert len(folders) == 3


def test_doctor_shows_and_empties_the_cache(root: Path, cli) -> None:
    folder = Path(jit.cache_folder(jit._PACKAGE / "costs" / "layer_time.py"))
    (folder / "function.nbc").write_bytes(bytes(3_000_000))
    status, out, _ = cli("doctor", "--clear-cache")
    assert status == 0
    assert "3.0 MB" in out
    assert str(root) in out
    assert not root.exists()
    assert jit.compiled_cache().files == 0
