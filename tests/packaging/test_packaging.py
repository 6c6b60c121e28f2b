"""The wheel holds one complete package, and the linked folders answer to one name only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("predictors", "placement", "cli", "experiments")


@pytest.mark.parametrize("name", LINKED)
def test_a_linked_folder_refuses_its_bare_name(name: str) -> None:
    assert (ROOT / "moeless" / name).is_symlink()
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"moeless.{name}" in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # through a source distribution, as a publisher would: links must survive both steps
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def _sources(root: Path) -> list[str]:
    """Files of the checkout; elsewhere (a source archive) everything that no tool has put there."""
    git = ["git", "-c", "safe.directory=*", "ls-files"]
    if (root / ".git").exists() and shutil.which("git"):
        return subprocess.run(git, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    made = {"__pycache__", "build", "dist", "results"}
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name not in made and not name.startswith(".") and "egg-info" not in name
        ]
        found += [Path(folder, name).relative_to(root).as_posix() for name in names]
    return found


def test_the_files_of_a_source_archive_are_those_of_the_checkout(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    for name in ("moeless", *LINKED):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    archive = {path for path in _sources(tmp_path) if path.endswith(".py")}
    tracked = {path for path in _sources(ROOT) if path.split("/")[0] in ("moeless", *LINKED) and path.endswith(".py")}
    # a working tree may hold new files and lack deleted ones
    assert {path for path in tracked if (ROOT / path).exists()} <= archive


def test_the_wheel_has_one_top_level_package_with_all_parts_and_assets(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"moeless"}
    sources = _sources(ROOT)
    assert len(sources) > 300
    for path in sources:
        top = path.split("/")[0]
        wanted = f"moeless/{path}" if top in LINKED else path if top == "moeless" and path[8:] not in LINKED else None
        if wanted and (ROOT / path).is_file():
            assert wanted in names, f"{path} is missing from the wheel"


def test_the_installed_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)],
        check=True,
        capture_output=True,
    )
    done = subprocess.run(
        [sys.executable, str(target / "bin" / "moeless"), "models", "bundled", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_experts"] == 16
    where = subprocess.run(
        [sys.executable, "-c", "import moeless.placement; print(moeless.placement.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(target) in where.stdout
