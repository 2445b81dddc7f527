"""scripts/collect_wheels.sh and install_wheels.sh, with real pip and wheels that are made up."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.made_up_wheels import (
    REPOSITORY,
    environment,
    make_requirements,
    make_torch,
    make_transformer_engine,
    make_venv,
    make_wheel,
    versions,
)

OWN_TORCH = "2.11.0a0+made.up"
needs_312 = pytest.mark.skipif(
    sys.version_info[:2] != (3, 12), reason="wheels are collected with Python 3.12"
)


def script(name: str, *words: object, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"scripts/{name}.sh", *map(str, words)],
        cwd=REPOSITORY,
        env=environment(**settings),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


def cut(wheel: Path, size: int) -> list[Path]:
    """Cuts a file into pieces as split does, and removes it."""
    data = wheel.read_bytes()
    pieces = []
    for number, start in enumerate(range(0, len(data), size)):
        pieces.append(wheel.with_name(f"{wheel.name}.part-{number:02}"))
        pieces[-1].write_bytes(data[start : start + size])
    wheel.unlink()
    return pieces


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python whose torch is a container's own build."""
    return make_venv(tmp_path / "venv", make_torch(tmp_path / "torch", OWN_TORCH))


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    return folder


def test_pieces_are_joined_and_what_is_missing_is_installed_and_torch_is_kept(
    python: Path, wheels: Path, tmp_path: Path
) -> None:
    make_requirements(wheels)
    make_torch(wheels, "9.9")  # somebody has put one there
    make_wheel(wheels, "tqdm", "0.1")  # an older one beside it
    pieces = cut(make_wheel(wheels, "wandb", "0.31.0", padding=12_000), 1000)
    assert len(pieces) > 10
    result = script("install_wheels", wheels, PYTHON=str(python))
    assert result.returncode == 0, result.stderr + result.stdout
    assert "joined wandb-0.31.0" in result.stderr
    assert "Ready for cpu." in result.stdout
    have = versions(python)
    assert have["torch"] == OWN_TORCH
    assert have["megatron-core"] == "0.19.2"
    assert have["tqdm"] != "0.1"
    again = script("install_wheels", wheels, PYTHON=str(python))
    assert again.returncode == 0
    assert "nothing to install" in again.stderr
    target = tmp_path / "target"
    other = make_venv(tmp_path / "other", *(tmp_path / "torch").glob("*.whl"))
    result = script("install_wheels", wheels, target, PYTHON=str(other))
    assert result.returncode == 0, result.stderr + result.stdout
    assert f"export PYTHONPATH={target}:{REPOSITORY}" in result.stderr
    assert (target / "tqdm.py").exists()
    assert set(versions(other)) == {"pip", "torch"}


def test_what_is_too_old_is_replaced_and_what_will_do_is_kept(python: Path, wheels: Path) -> None:
    for name, version in (("einops", "0.8"), ("pydantic", "2.0")):
        make_wheel(wheels.parent / "old", name, version)
    old = [*(wheels.parent / "old").glob("*.whl")]
    command = [python, "-m", "pip", "install", "-q", "--no-index", *old]
    subprocess.run(command, check=True, env=environment())
    make_wheel(wheels, "einops", "0.9")
    make_wheel(wheels, "pydantic", "2.9")
    make_wheel(wheels, "needy", "1", "pydantic>=2.5", "torch>=2.10")
    script("install_wheels", wheels, PYTHON=str(python))
    have = versions(python)
    assert (have["einops"], have["pydantic"], have["needy"]) == ("0.8", "2.9", "1")


def test_what_cannot_be_used_is_refused_before_anything_is_installed(
    python: Path, wheels: Path, tmp_path: Path
) -> None:
    before = versions(python)

    def run(folder: Path = wheels, **settings: str) -> tuple[int, str, str]:
        result = script("install_wheels", folder, **{"PYTHON": str(python), **settings})
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, result.stderr
        assert versions(python) == before
        return result.returncode, errors[0], result.stderr

    def refused(*words: str, **settings: Any) -> None:
        code, error, _ = run(**settings)
        assert code == 2, error
        assert all(word in error for word in words), error

    def refused_by_pip(*words: str) -> None:
        code, error, output = run()
        assert (code, error) == (1, "error: pip failed, and nothing was installed")
        assert all(word in output for word in words), output

    refused("/nowhere/wheels", "no such folder", folder=Path("/nowhere/wheels"))
    refused(str(wheels), "no wheel in it")
    good = make_wheel(wheels, "good", "1", padding=3000)
    refused("PYTHON", PYTHON="/nowhere/python")
    bare = make_venv(tmp_path / "bare")
    refused("no torch", PYTHON=str(bare))
    other = make_wheel(wheels, "other", "1", tag="cp311-cp311-manylinux2014_x86_64")
    refused("other: no wheel of it is for", str(python))
    other.unlink()
    needy = make_wheel(wheels, "needy", "1", "einops>=0.8")
    refused_by_pip("einops>=0.8")
    needy.unlink()
    newer = make_wheel(wheels, "newer", "1", "torch>=3")
    refused_by_pip("torch>=3", f"torch=={OWN_TORCH}")
    newer.unlink()
    (wheels / "not-a-wheel.whl").touch()
    refused("not-a-wheel.whl")
    (wheels / "not-a-wheel.whl").unlink()
    (wheels / "SHA256SUMS").write_text(f"{'0' * 64}  {good.name}\n")
    refused(good.name, "missing in", "or damaged")
    (wheels / "SHA256SUMS").write_text(f"{'0' * 64}  gone-1-py3-none-any.whl\n")
    refused("gone-1-py3-none-any.whl", "missing in")
    (wheels / "SHA256SUMS").unlink()
    cut(good, 1000)[1].unlink()
    refused(good.name, "piece is missing or damaged")


@needs_312
def test_what_was_collected_is_installed_on_the_other_side(wheels: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    make_requirements(index)
    make_wheel(index, "einops", "0.8.2", padding=1_500_000)
    make_wheel(index, "numpy", "2.5.5")
    make_wheel(index, "setuptools", "81.0.0")
    cuda = make_wheel(index, "transformer_engine_cu13", "2.20.2")
    make_torch(index, "9.9")
    engine, built = make_transformer_engine(tmp_path / "te", "2.20.2", "cp312-cp312-linux_x86_64")
    shutil.copy(built, wheels)
    # As the real one, whose extras name the parts.
    engine.unlink()
    files = {
        "transformer_engine/__init__.py": "__version__ = '2.20.2'",
        "transformer_engine/pytorch/__init__.py": "Linear = None",
    }
    extras = (f"{cuda.name.split('-')[0]}==2.20.2; extra == 'core-cu13'",)
    extras += ("transformer_engine_torch==2.20.2; extra == 'pytorch'",)
    make_wheel(index, "transformer_engine", "2.20.2", *extras, files=files)
    torch = make_torch(tmp_path / "torch", "2.11.0")
    tools = [index / name for name in ("numpy-2.5.5-py3-none-any.whl",)]
    tools += [*index.glob("packaging-*"), *index.glob("setuptools-*")]
    make_venv(tmp_path / "build", torch, *tools)
    result = script(
        "collect_wheels",
        wheels,
        PRORES_BUILD_VENV=str(tmp_path / "build"),
        PRORES_PIECE_MB="1",
        PIP_FIND_LINKS=str(index),
    )
    assert result.returncode == 0, result.stderr
    assert (wheels / "TORCH").read_text() == "2.11.0 with CUDA 13.0\n"
    assert not list(wheels.glob("torch-*"))
    assert len(list(wheels.glob("einops-0.8.2-py3-none-any.whl.part-*"))) == 2
    python = make_venv(tmp_path / "there", torch)
    result = script("install_wheels", wheels, PYTHON=str(python))
    assert result.returncode == 0, result.stderr + result.stdout
    assert "Ready for cpu, te." in result.stdout
    assert "collected for torch" not in result.stderr
    have = versions(python)
    assert (have["torch"], have["transformer_engine_torch"]) == ("2.11.0", "2.20.2")
    assert have["transformer_engine_cu13"] == "2.20.2"
    other = make_venv(tmp_path / "elsewhere", make_torch(tmp_path / "newer", "2.12.0"))
    result = script("install_wheels", wheels, PYTHON=str(other))
    collected = "collected for torch 2.11.0 with CUDA 13.0, and this is "
    assert f"{collected}2.12.0 with CUDA 13.0: " in result.stderr
    make_venv(tmp_path / "other-cuda", make_torch(tmp_path / "cu12", "2.11.0", cuda="12.8"))
    result = script("install_wheels", wheels, PYTHON=str(tmp_path / "other-cuda/bin/python"))
    assert f"{collected}2.11.0 with CUDA 12.8: " in result.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"PRORES_TORCH": "newest"}, ("PRORES_TORCH=newest", "version")),
        ({"PRORES_TE": "no"}, ("PRORES_TE=no", "version")),
        ({"PRORES_PIECE_MB": "0"}, ("PRORES_PIECE_MB=0",)),
        ({"PRORES_BUILD_VENV": "/nowhere"}, ("PRORES_BUILD_VENV=/nowhere",)),
        ({"CUDA_HOME": "/nowhere"}, ("/nowhere/bin/nvcc", "CUDA_HOME", "PRORES_TE=none")),
    ],
)
def test_collecting_with_a_wrong_setting_is_one_line(
    settings: dict[str, str], words: tuple[str, ...], tmp_path: Path
) -> None:
    result = script("collect_wheels", tmp_path / "wheels", **settings)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line
    assert not (tmp_path / "wheels").exists()
