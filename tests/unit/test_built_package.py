"""The wheel of this project: what is in it, and that it works where there is no clone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.examples.clone import REPOSITORY, make_clone

if importlib.util.find_spec("setuptools") is None:
    pytest.skip("setuptools, which builds the wheel, is not installed", allow_module_level=True)

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
COMMANDS = PROJECT["project"]["scripts"]

USE = """
import pathlib, sys
import megatron_prores as prores
assert pathlib.Path(prores.__file__).is_relative_to(sys.argv[1]), prores.__file__
print(prores.ProResConfig(schedule="linear", warmup_iters=40).alphas(10, 4).tolist())
for name in prores.__all__:
    getattr(prores, name)
"""


def pip(*words: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *words]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git has, in a copy: a build leaves folders behind. Nothing is downloaded."""
    root = tmp_path_factory.mktemp("wheel")
    source = make_clone(root / "clone")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", root / "out", source)
    (built,) = (root / "out").glob("megatron_prores-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def run(installed: Path, directory: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Runs a command elsewhere, with the installed package alone to be found."""
    return subprocess.run(
        list(map(str, command)),
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(installed), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_wheel_has_the_package_whole_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = (REPOSITORY / "megatron_prores").rglob("*")
    expected = {
        str(path.relative_to(REPOSITORY))
        for path in package
        if path.suffix in (".py", ".toml", ".yaml") or path.name == "py.typed"
    }
    assert names == {"pretrain_gpt_prores.py", *expected}


def test_the_names_work_where_there_is_no_clone(installed: Path, tmp_path: Path) -> None:
    result = run(installed, tmp_path, sys.executable, "-c", USE, installed)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[1.0, 0.5, 0.3333333333333333, 0.25]\n"


EXPLAIN = """
import contextlib, importlib.metadata, io, json, sys
import megatron_prores
commands, printed = importlib.metadata.distribution("megatron-prores").entry_points, {}
for command in commands.select(group="console_scripts"):
    sys.argv = [command.name, "--help"]
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            command.load()()
    except SystemExit as end:
        printed[command.name] = [end.code, output.getvalue()]
print(json.dumps(printed))
"""


def test_every_console_command_explains_itself(installed: Path, tmp_path: Path) -> None:
    # In one process: most of them import torch.
    result = run(installed, tmp_path, sys.executable, "-c", EXPLAIN)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed.keys() == COMMANDS.keys()
    for command, (code, words) in printed.items():
        assert not code
        module = command.replace("prores-", "python -m megatron_prores.")
        assert words.startswith((f"usage: {command} ", f"usage: {module} "))
        assert os.access(installed / "bin" / command, os.X_OK)


def test_a_console_command_refuses_in_one_line(installed: Path, tmp_path: Path) -> None:
    result = run(installed, tmp_path, installed / "bin" / "prores-plan", "--nonsense")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


TRAINING = """
    --device cpu --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16
    --max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 2 --lr 1e-3
    --eval-interval 100 --eval-iters 0 --log-interval 1 --train-iters 2 --mock-data
    --tokenizer-type NullTokenizer --vocab-size 63 --prores-warmup-iters 4
""".split()


def test_the_main_program_trains_where_there_is_no_clone(installed: Path, tmp_path: Path) -> None:
    launched = [installed / "bin" / "prores-launch", "--standalone", "-m", "pretrain_gpt_prores"]
    result = run(installed, tmp_path, *launched, *TRAINING)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "iteration        2/" in result.stdout
    assert "> ProRes: schedule linear, warmup of 4 iterations over 2 layers" in result.stdout
