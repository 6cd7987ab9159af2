"""The layout that packaging depends on: four links in `src/weightcast`, and a wheel that holds what they lead to."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import weightcast

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "weightcast"
ROOMS = ("sync", "bridges", "trainer", "adapters")


def run_python(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_relative_links(room: str) -> None:
    assert (PACKAGE / room).is_symlink()
    assert os.readlink(PACKAGE / room) == f"../../{room}"


def test_package_folder_holds_nothing_else() -> None:
    names = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert names == {"__init__.py", "__main__.py", "cli.py", "py.typed", *ROOMS}


def test_installed_version_is_the_one_in_the_source() -> None:
    assert version("weightcast") == weightcast.__version__


def test_module_prints_its_version(tmp_path: Path) -> None:
    done = run_python("-m", "weightcast", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, f"weightcast {weightcast.__version__}")


def test_links_that_became_text_are_refused_with_the_remedy(tmp_path: Path) -> None:
    broken = tmp_path / "weightcast"
    broken.mkdir()
    shutil.copy(PACKAGE / "__init__.py", broken)
    (broken / "sync").write_text("../../sync")
    done = run_python("-c", "import weightcast", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "links" in done.stderr and "git clone" in done.stderr


def test_wheel_built_from_the_sdist_holds_every_module(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    sdist = tmp_path / "sdist"
    sdist.mkdir()
    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    made = run_python("-c", build, "build_sdist", str(sdist), cwd=tree)
    assert made.returncode == 0, made.stderr
    (archive,) = sdist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"weightcast-{weightcast.__version__}"
    made = run_python("-c", build, "build_wheel", str(tmp_path), cwd=unpacked)
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as built:
        names = set(built.namelist())
    assert modules_of_the_tree() <= names
    assert "weightcast/py.typed" in names
    assert not {name for name in names if not name.startswith(("weightcast/", "weightcast-"))}


def copy_tree(target: Path) -> Path:
    """All files that git knows or would add, links as links; a build leaves its traces there and not here."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        source, copy = ROOT / name, target / name
        if name and (source.is_symlink() or source.is_file()):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy, follow_symlinks=False)
    return target


def modules_of_the_tree() -> set[str]:
    """The names that the modules of the four rooms must have in the wheel."""
    rooms = {
        f"weightcast/{path.relative_to(ROOT).as_posix()}" for room in ROOMS for path in (ROOT / room).rglob("*.py")
    }
    return rooms | {f"weightcast/{path.name}" for path in PACKAGE.glob("*.py")}
