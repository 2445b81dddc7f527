"""What scripts/setup.sh promises, tried in a small clone on a machine that is made up.

The clone's pyproject.toml has no dependencies, so that the real script makes a real virtual
environment in seconds and downloads nothing. PATH has only the commands that the script uses, and
the Pythons that a test puts there.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
# fmt: off
COMMANDS = [
    "awk", "bash", "cat", "cut", "df", "dirname", "du", "env", "find", "flock", "head", "ls",
    "mkdir", "mv", "rm", "sleep", "tail",
]
# fmt: on
BASE_PYTHON = getattr(sys, "_base_executable", sys.executable)
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
    assert f"from {clone.home}/.pyenv/versions/{VERSION}/bin/python3\n" in result.stderr


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
    assert sorted(clone.path.rglob("*")) == before


def test_a_python_without_ensurepip_is_passed_over(clone: Clone, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "ensurepip.py").write_text("raise ImportError")
    # As Debian's python3.12 is without python3.12-venv.
    clone.add_command(
        clone.commands / "python3.12", f'PYTHONPATH={broken} exec "{BASE_PYTHON}" "$@"'
    )
    other = clone.home / "miniforge3" / "envs" / "work" / "bin" / "python3"
    clone.add_command(other, f'exec "{BASE_PYTHON}" "$@"')
    clone.fill_disk()  # so that it stops when it has chosen, which saves the test some seconds
    assert f"from {other}\n" in clone.set_up().stderr
    result = clone.set_up(PRORES_PYTHON="python3.12")
    assert result.returncode == 2
    assert "it lacks the module ensurepip" in result.stderr


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
    result = ready.set_up()
    ready.assert_ready(result)
    assert "making it anew" in result.stderr
    assert not left_over.exists()


def test_after_a_failed_installation_the_next_set_up_makes_the_venv_anew(clone: Clone) -> None:
    clone.add_pyenv_python()
    clone.require("no-such-package-of-prores")
    result = clone.set_up()
    assert result.returncode == 1
    assert result.stdout == ""
    assert "no-such-package-of-prores" in result.stderr  # pip's own last lines
    assert str(clone.venv / "setup.log") in result.stderr
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
