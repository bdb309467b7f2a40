"""The repository's unusual layout: two packages at the top that install below ``persona_sdk``."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = {"adapters": "persona_sdk.adapters", "memory": "persona_sdk.memory"}


def tracked_files() -> list[str]:
    """What a commit of the working tree would hold."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def installed_name(file: str) -> str:
    """Where a source file of ours lies once it is installed."""
    return f"persona_sdk/{file}" if file.split("/")[0] in MAPPED else file


def sources() -> set[str]:
    """Installed names of every Python file of the three packages."""
    ours = [f for f in tracked_files() if f.split("/")[0] in ("persona_sdk", *MAPPED) and f.endswith(".py")]
    return {installed_name(file) for file in ours}


def test_the_package_list_equals_the_disk():
    on_disk = {str(Path(f).parent).replace("/", ".") for f in sources() if f.endswith("/__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == on_disk


def test_every_folder_with_code_is_a_package():
    folders = {str(Path(file).parent) for file in sources()}
    assert {f"{folder}/__init__.py" for folder in folders} <= sources()


@pytest.mark.parametrize("name", sorted(MAPPED))
def test_the_bare_name_refuses_to_be_imported(name):
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ImportError: Import this package as {MAPPED[name]}" in done.stderr


@pytest.mark.parametrize("name", sorted(MAPPED))
def test_the_full_name_is_one_package_whatever_path_it_was_found_by(name):
    program = f"import {MAPPED[name]} as p; print(p.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == MAPPED[name]


@pytest.mark.parametrize("name", sorted(MAPPED))
def test_the_symlinks_are_tracked_as_symlinks(name):
    command = ["git", "ls-files", "--stage", f"persona_sdk/{name}"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert listed.startswith("120000 ")
    assert (ROOT / "persona_sdk" / name).readlink() == Path("..") / name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """Names in the wheel, built from a copy so that no build folder is left in the repository."""
    work = tmp_path_factory.mktemp("wheel")
    for file in tracked_files():
        (work / "source" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, work / "source" / file, follow_symlinks=False)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(work),
        str(work / "source"),
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = work.glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_the_wheel_holds_every_module_once_and_nothing_else(wheel):
    code = {name for name in wheel if name.endswith(".py")}
    assert code == sources()
    assert {name.split("/")[0] for name in wheel} == {"persona_sdk", "persona_sdk-0.1.0.dist-info"}


def test_the_wheel_holds_what_is_not_code(wheel):
    others = {installed_name(f) for f in tracked_files() if f.startswith("memory/") and not f.endswith(".py")}
    assert {"persona_sdk/py.typed", *others} <= wheel
    assert "persona_sdk/adapters/base.py" in wheel
    assert any(name.startswith("persona_sdk/memory/migrations/versions/0") for name in wheel)
    assert "persona_sdk-0.1.0.dist-info/licenses/LICENSE" in wheel
