"""What scripts/setup.sh promises, tried in a small clone on a machine that is made up.

The clone's pyproject.toml has no dependencies, so that the real script makes a real virtual
environment in seconds and downloads nothing. PATH has only the commands that the script uses, and
the Pythons that a test puts there.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from tests.unit.made_up_wheels import make_torch, make_wheel, versions

REPO = Path(__file__).resolve().parents[2]
# fmt: off
COMMANDS = [
    "awk", "bash", "cat", "df", "dirname", "env", "find", "flock", "head", "ls", "mkdir", "mv",
    "rm", "sort",
]
# fmt: on
BASE_PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("ensurepip") is None, reason="this Python lacks ensurepip"
    ),
    pytest.mark.skipif(shutil.which("flock") is None, reason="no flock command on this machine"),
]


class Clone:
    """A small clone of the project, and a machine's home and PATH to run its setup.sh on."""

    def __init__(self, place: Path) -> None:
        self.path = place / "clone"
        self.home = place / "home"
        self.commands = place / "bin"
        for directory in (self.path / "scripts", self.home, self.commands):
            directory.mkdir(parents=True)
        for script in ("setup.sh", "requirements.py"):
            shutil.copy(REPO / "scripts" / script, self.path / "scripts")
        for name in COMMANDS:
            (self.commands / name).symlink_to(shutil.which(name))
        self.constraints = self.path / "constraints.txt"
        self.constraints.write_text("# none\n")
        self.require()
        self.venv = self.path / ".venv"
        self.python = self.venv / "bin" / "python"

    def require(self, *dependencies: str) -> None:
        (self.path / "pyproject.toml").write_text(
            f'[project]\nname = "p"\nversion = "1"\ndependencies = {list(dependencies)!r}\n'
        )

    def add_command(self, place: Path, body: str) -> Path:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.write_text(f"#!/usr/bin/env bash\n{body}\n")
        place.chmod(0o755)
        return place

    def add_pyenv_python(self) -> Path:
        """Where a user's own Python often is, out of PATH."""
        place = self.home / ".pyenv" / "versions" / VERSION / "bin" / "python3"
        return self.add_command(place, f'exec "{BASE_PYTHON}" "$@"')

    def fill_disk(self) -> None:
        """Leaves 3 GB of it, as far as df tells."""
        line = "/dev/x 9000000 6000000 3000000 67% /"
        self.add_command(self.commands / "df", f"echo Filesystem; echo '{line}'")

    def start(self, **settings: str) -> subprocess.Popen[str]:
        environment = {"HOME": str(self.home), "PATH": str(self.commands), "PIP_NO_INDEX": "1"}
        return subprocess.Popen(
            ["bash", "scripts/setup.sh"],
            cwd=self.path,
            env=environment | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def set_up(self, **settings: str) -> subprocess.CompletedProcess[str]:
        process = self.start(**settings)
        output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def assert_ready(self, result: subprocess.CompletedProcess[str]) -> None:
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"{self.python}\n"
        subprocess.run([self.python, "-m", "pip", "--version"], check=True, capture_output=True)


def make_python(place: Path, *wheels: Path, without: str = "") -> Path:
    """A Python of its own, with packages, and the real one's library but for what it is without."""
    library = Path(sysconfig.get_path("stdlib"))
    own = place / "lib" / library.name
    for directory in (own, place / "bin"):
        directory.mkdir(parents=True)
    for each in library.iterdir():
        if each.name not in {"site-packages", *without.split()}:
            (own / each.name).symlink_to(each)
    python = shutil.copy(BASE_PYTHON, place / "bin" / "python3")
    code = "import site; print(site.getsitepackages()[0])"
    site = Path(subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip())
    assert site.is_relative_to(place)
    site.mkdir(parents=True, exist_ok=True)
    if "pip" not in without.split():
        (site / "pip").symlink_to(importlib.util.find_spec("pip").submodule_search_locations[0])
    for wheel in wheels:
        shutil.unpack_archive(wheel, site, "zip")
    return python


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Clone, subprocess.CompletedProcess]:
    """A first set-up on a machine whose only usable Python is in pyenv's folder."""
    clone = Clone(tmp_path_factory.mktemp("first"))
    # As where pyenv's shims lead nowhere: they exist, and fail.
    for name in ("python3", "python3.12", "python3.13"):
        clone.add_command(clone.commands / name, "echo 'pyenv: not found' >&2; exit 127")
    clone.add_pyenv_python()
    return clone, clone.set_up()


@pytest.fixture
def ready(first: tuple[Clone, subprocess.CompletedProcess], tmp_path: Path) -> Clone:
    """A clone whose environment is made already, for the test to change as it likes."""
    clone = Clone(tmp_path)
    shutil.copytree(first[0].venv, clone.venv, symlinks=True)
    return clone


def test_failing_shims_on_path_are_passed_over_for_a_python_in_pyenv(
    first: tuple[Clone, subprocess.CompletedProcess],
) -> None:
    clone, result = first
    clone.assert_ready(result)
    assert f"from {BASE_PYTHON}\n" in result.stderr


def test_without_a_usable_python_it_says_what_to_install_and_makes_nothing(clone: Clone) -> None:
    if list(Path("/opt/conda").glob("bin/python3")):
        pytest.skip("/opt/conda has a Python, which setup.sh rightly finds")
    clone.add_command(clone.commands / "python3", "exit 127")
    before = sorted(clone.path.rglob("*"))
    result = clone.set_up()
    assert result.returncode == 1
    assert result.stdout == ""
    assert f"{clone.commands}/python3 does not run" in result.stderr
    for way in ("apt-get install", "uv python install", "pyenv install", "conda create"):
        assert way in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "no usable Python 3.12 or newer" in line
    assert sorted(clone.path.rglob("*")) == before


def test_a_python_with_neither_ensurepip_nor_pip_is_passed_over(clone: Clone) -> None:
    # As Debian's is without python3-venv and python3-pip.
    bare = make_python(clone.home / "bare", without="ensurepip pip")
    (clone.commands / "python3.12").symlink_to(bare)
    other = make_python(clone.home / "miniforge3" / "envs" / "work")
    clone.fill_disk()  # so that it stops when it has chosen, which saves the test some seconds
    assert f"from {other}\n" in clone.set_up().stderr
    result = clone.set_up(PRORES_PYTHON="python3.12")
    assert result.returncode == 2
    assert "PRORES_PYTHON=python3.12 cannot be used: it has neither pip nor" in result.stderr


def test_pip_brings_virtualenv_where_there_is_no_ensurepip(clone: Clone, tmp_path: Path) -> None:
    # As Debian's is with python3-pip, but without python3-venv.
    python = make_python(clone.home / "python", without="ensurepip")
    code = "import sys, venv; venv.create(sys.argv[-1], system_site_packages=True)"
    files = {"virtualenv/__init__.py": "", "virtualenv/__main__.py": code}
    make_wheel(tmp_path / "wheels", "virtualenv", "21.0", files=files)
    settings = {"PRORES_PYTHON": str(python), "PRORES_VENV": str(clone.venv)}
    clone.assert_ready(clone.set_up(PIP_FIND_LINKS=str(tmp_path / "wheels"), **settings))
    assert not (clone.venv / "virtualenv").exists()


def test_what_a_container_lacks_is_put_on_top_of_its_torch(clone: Clone, tmp_path: Path) -> None:
    container, wheels = tmp_path / "container", tmp_path / "wheels"
    torch = make_torch(tmp_path, "2.11.0a0+made.up")
    python = make_python(container, torch, make_wheel(tmp_path, "tqdm", "4.0"))
    (clone.commands / "python3").symlink_to(python)
    make_torch(wheels, "9.9")
    make_wheel(wheels, "wandb", "0.31.0", "torch>=2.1")
    make_wheel(wheels, "tqdm", "4.70.1")
    clone.require("torch>=2.11", "tqdm>=4.66", "wandb>=0.19")
    before = sorted(container.rglob("*"))
    settings = {"PRORES_SYSTEM_SITE_PACKAGES": "1", "PIP_FIND_LINKS": str(wheels)}
    clone.assert_ready(clone.set_up(**settings))
    have = versions(clone.python)
    assert (have["torch"], have["wandb"]) == ("2.11.0a0+made.up", "0.31.0")
    assert sorted(each for each in container.rglob("*") if "__pycache__" not in each.parts) == [
        each for each in before if "__pycache__" not in each.parts
    ]
    assert clone.set_up(**settings).stderr == ""


@pytest.mark.parametrize("body", ["exit 127", 'echo "is Python 3.11, and too old"; exit 1'])
def test_an_unusable_prores_python_is_one_clear_line(clone: Clone, body: str) -> None:
    python = clone.add_command(clone.home / "my-python", body)
    result = clone.set_up(PRORES_PYTHON=str(python))
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: PRORES_PYTHON={python} cannot be used: it ")
    assert not clone.venv.exists()


def test_a_second_set_up_does_nothing(ready: Clone) -> None:
    before = {path: path.lstat().st_mtime_ns for path in ready.venv.rglob("*")}
    result = ready.set_up()
    ready.assert_ready(result)
    assert result.stderr == ""
    assert {path: path.lstat().st_mtime_ns for path in ready.venv.rglob("*")} == before


def test_changed_constraints_update_the_environment_in_place(ready: Clone) -> None:
    kept = ready.venv / "kept"
    kept.touch()
    ready.constraints.write_text("# other\n")
    result = ready.set_up()
    ready.assert_ready(result)
    assert "updating" in result.stderr
    assert kept.exists()
    assert ready.set_up().stderr == ""


def test_a_venv_whose_python_is_gone_is_made_anew(ready: Clone) -> None:
    ready.add_pyenv_python()
    left_over = ready.venv / "left-over"
    left_over.touch()
    ready.python.unlink()
    ready.python.symlink_to("/nonexistent/python")
    ready.fill_disk()  # so that it stops when it has cleared away: that saves some seconds
    assert "making it anew" in ready.set_up().stderr
    assert not left_over.exists()


def test_after_a_failed_installation_the_next_set_up_makes_the_venv_anew(ready: Clone) -> None:
    clone = ready
    clone.add_pyenv_python()
    clone.require("no-such-package-of-prores")
    result = clone.set_up()
    assert result.returncode == 1
    assert result.stdout == ""
    assert "no-such-package-of-prores" in result.stderr  # pip's own words
    assert result.stderr.splitlines()[-1].startswith("error: pip failed, see above")
    clone.require()
    result = clone.set_up()
    clone.assert_ready(result)
    assert "making it anew" in result.stderr


def test_two_set_ups_at_once_make_one_environment(clone: Clone) -> None:
    clone.add_pyenv_python()
    processes = [clone.start(), clone.start()]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [output for output, _ in outputs] == [f"{clone.python}\n"] * 2
    assert sum("making a virtual environment" in errors for _, errors in outputs) == 1


def test_a_directory_that_it_did_not_make_is_left_alone(clone: Clone) -> None:
    clone.add_pyenv_python()
    thesis = clone.home / "thesis.tex"
    thesis.touch()
    clone.require("no-such-package-of-prores")
    result = clone.set_up(PRORES_VENV=str(clone.home))
    assert result.returncode == 2
    assert "was not made by this script" in result.stderr
    assert thesis.exists()


def test_too_little_disk_is_told_before_anything_is_installed(clone: Clone) -> None:
    clone.add_pyenv_python()
    clone.fill_disk()
    result = clone.set_up()
    assert result.returncode == 1
    assert "10 GB of free disk are needed" in result.stderr
    assert "3 GB are there" in result.stderr
    assert not clone.python.exists()


def test_the_python_that_runs_already_is_taken_when_it_has_everything(clone: Clone) -> None:
    clone.add_command(clone.commands / "python3", f'exec "{sys.executable}" "$@"')
    clone.require("pytest>=1", "no-such-package-of-prores; python_version < '3'")
    result = clone.set_up()
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{sys.executable}\n"
    assert not clone.venv.exists()


def test_a_containers_own_build_of_torch_counts_as_the_release_it_holds(
    clone: Clone, tmp_path: Path
) -> None:
    info = tmp_path / "container" / "torch-2.11.0a0+1a2b3c4.nv26.2.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0a0+1a2b3c4.nv26.2\n"
    )
    clone.add_command(
        clone.commands / "python3", f'PYTHONPATH={info.parent} exec "{sys.executable}" "$@"'
    )
    clone.require("torch>=2.11")
    result = clone.set_up()
    assert result.stdout == f"{sys.executable}\n", result.stderr


def test_an_explicit_prores_venv_is_made_even_if_the_running_python_has_everything(
    ready: Clone,
) -> None:
    ready.add_command(ready.commands / "python3", f'exec "{sys.executable}" "$@"')
    result = ready.set_up(PRORES_VENV=str(ready.venv))
    assert result.stdout == f"{ready.python}\n"


def test_every_requirement_has_an_exact_version_in_the_constraints() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["dev"]
    lines = (REPO / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    assert {re.split(r"[^\w-]", text)[0].lower() for text in requirements} <= pinned


def test_the_script_names_no_host() -> None:
    text = (REPO / "scripts" / "setup.sh").read_text() + (REPO / "constraints.txt").read_text()
    assert "://" not in text
