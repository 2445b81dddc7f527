"""The Dockerfile and examples/docker, as far as they go without a Docker engine.

The Dockerfile's own commands are run in a virtual environment that holds a torch already; the file
is linted; docker itself is a stand-in that records how it was called.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.clone import REPOSITORY, environment, make_clone, run
from tests.unit import made_up_wheels
from tests.unit.made_up_wheels import make_requirements, make_torch, make_venv, make_wheel, versions

BLOCKS = re.findall(
    r"^```bash\n(.*?)^```", (REPOSITORY / "docs/docker.md").read_text(), flags=re.M | re.S
)
HADOLINT = Path(sys.executable).parent / "hadolint"


def instructions(name: str) -> list[str]:
    """The instructions of one kind in the Dockerfile, as they stand there."""
    text = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.partition(f"{name} ")[2] for line in text.splitlines() if line.startswith(name)]
    return [" ".join(line.split()) for line in lines]


def test_the_dockerfile_is_clean() -> None:
    result = subprocess.run(
        [HADOLINT, REPOSITORY / "Dockerfile"], capture_output=True, text=True, timeout=240
    )
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


def install(clone: Path, python: Path, *words: str, **settings: str) -> tuple[int, str]:
    result = subprocess.run(
        ["bash", "scripts/install_in_place.sh", *words],
        cwd=clone,
        env=made_up_wheels.environment(PYTHON=str(python), **settings),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    return result.returncode, result.stdout + result.stderr


def test_the_dockerfiles_commands_leave_the_torch_that_is_there_alone(tmp_path: Path) -> None:
    clone, index, image = make_clone(tmp_path / "clone"), tmp_path / "index", tmp_path / "image"
    make_requirements(index)
    make_torch(index, "9.9")
    make_wheel(index, "apex", "9.9")
    own = {"torch": "2.11.0a0+made.up", "apex": "0.1", "flash_attn": "2.7.4"}
    make_torch(image, own["torch"])
    make_wheel(image, "apex", own["apex"])
    make_wheel(image, "flash_attn", own["flash_attn"])
    make_wheel(image, "tensorboard", "2.0")
    make_wheel(image, "tqdm", "4.66.1")
    python = make_venv(tmp_path / "venv", *image.glob("*.whl"))
    made_up_wheels.borrow(tmp_path / "venv", "setuptools", "packaging")
    # As NVIDIA's images have it.
    constraint = tmp_path / "constraint.txt"
    constraint.write_text("packaging==23.2\ntensorboard==2.0\nwandb==0.1\n")
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"PATH": path, "PIP_FIND_LINKS": str(index), "PIP_CONSTRAINT": str(constraint)}

    def execute(command: list[str]) -> str:
        result = subprocess.run(
            command,
            cwd=clone,
            env=made_up_wheels.environment(**settings),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    packages, project, _ = instructions("RUN")  # the last makes a user
    output = execute(["bash", "-c", f"({packages}) 2>&1"])
    assert "replaced: tensorboard==2.0 by tensorboard==2" in output
    assert output.count("replaced:") == 1
    assert "Ready for cpu." in execute(["bash", "-c", project])
    have = versions(python)
    assert {name: have[name] for name in own} == own
    assert have["tqdm"] == "4.66.1"  # it does
    assert have["megatron-core"] == "0.19.2"
    assert have["megatron-prores"]
    (health,) = instructions("HEALTHCHECK")
    (start,) = instructions("CMD")
    assert execute(json.loads(health.partition("CMD ")[2])) == ""
    assert "Ready for cpu." in execute(json.loads(start))
    # All that is needed is there now, so nothing in the image makes an environment of its own.
    answer = run(["bash", "scripts/setup.sh"], clone, PATH=path)
    assert Path(answer.stdout.strip()).parent == python.parent, answer.stderr
    assert not (clone / ".venv").exists()


def test_a_package_that_wants_another_torch_does_not_get_it(tmp_path: Path) -> None:
    index = tmp_path / "index"
    make_requirements(index)
    make_torch(index, "9.9")
    make_wheel(index, "psutil", "99", "torch>=9")
    next(index.glob("psutil-7*")).unlink()
    python = make_venv(tmp_path / "venv", make_torch(tmp_path / "image", "2.12.0"))
    code, output = install(REPOSITORY, python, "packages", PIP_FIND_LINKS=str(index))
    assert code == 1
    assert "error: pip failed" in output
    assert set(versions(python).items()) >= {("torch", "2.12.0")}


def test_other_versions_are_taken_where_those_of_the_constraints_do_not_fit(tmp_path: Path) -> None:
    clone, index = make_clone(tmp_path / "clone"), tmp_path / "index"
    make_requirements(index, tqdm="4.99.0")
    python = make_venv(tmp_path / "venv", make_torch(tmp_path / "image", "2.12.0"))
    code, output = install(clone, python, "packages", PIP_FIND_LINKS=str(index))
    assert code == 0, output
    assert "do not get along" in output
    assert (versions(python)["tqdm"], versions(python)["torch"]) == ("4.99.0", "2.12.0")


def test_an_image_that_cannot_be_used_is_told_and_left_as_it_is(tmp_path: Path) -> None:
    old = make_venv(tmp_path / "old", make_torch(tmp_path / "image", "2.9.0"))
    bare = make_venv(tmp_path / "bare")
    for python, words in (
        (old, ("torch 2.9.0", "torch>=2.11", "newer image")),
        (bare, ("no torch", "No module named 'torch'")),
        (Path("/nowhere/python"), ("/nowhere/python", "3.12")),
    ):
        code, output = install(REPOSITORY, python, "packages")
        assert code == 2, output
        (line,) = [each for each in output.splitlines() if each.startswith("error: ")]
        assert all(word in line for word in words), line
    assert set(versions(old)) == {"pip", "torch"}
    assert install(REPOSITORY, old, "everything")[0] == 2


class Docker:
    """A docker command that records its arguments and variables, in the current folder."""

    def __init__(self, place: Path) -> None:
        self.folder = place / "work"
        self.folder.mkdir()
        self.bin = place / "bin"
        self.bin.mkdir()
        self.record = place / "record.json"
        stand_in = self.bin / "docker"
        stand_in.write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            f"json.dump([sys.argv[1:], dict(os.environ)], open({str(self.record)!r}, 'w'))\n"
            "sys.exit(int(os.environ.get('STAND_IN_CODE', 0)))\n"
        )
        stand_in.chmod(0o755)

    def run(self, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        self.record.unlink(missing_ok=True)
        kept = {name: text for name, text in os.environ.items() if not name.startswith("SLURM_")}
        return subprocess.run(
            ["bash", str(REPOSITORY / "examples/docker/run.sh"), *words],
            cwd=self.folder,
            env={**kept, "PATH": f"{self.bin}:{os.environ['PATH']}", **settings},
            capture_output=True,
            text=True,
            timeout=240,
        )

    def called(self, *words: str, **settings: str) -> tuple[str, dict[str, str]]:
        result = self.run(*words, **settings)
        assert result.returncode == 0, result.stderr
        arguments, variables = json.loads(self.record.read_text())
        return " ".join(arguments), variables


@pytest.fixture
def docker(tmp_path: Path) -> Docker:
    return Docker(tmp_path)


def test_one_node(docker: Docker) -> None:
    (docker.folder / "data").mkdir()
    line, variables = docker.called(
        "examples/pretrain_130m.sh", "post", WANDB_API_KEY="s3cret", TP="2", NCCL_DEBUG="WARN",
        CUDA_HOME="/usr/local/cuda-12", PRORES_VENV="/home/me/venv",
    )  # fmt: skip
    assert line.startswith("run --rm --init --name prores ")
    assert line.endswith(" megatron-prores bash examples/pretrain_130m.sh post")
    (inside,) = instructions("WORKDIR")
    for option in (
        "--gpus all",
        "--ipc host",
        "--ulimit memlock=-1",
        "--ulimit stack=67108864",
        f"--user {os.getuid()}:{os.getgid()}",
        f"type=bind,source={docker.folder}/data,target={inside}/data",
        f"type=bind,source={docker.folder}/runs,target={inside}/runs",
        "--env WANDB_API_KEY",
        "--env TP",
        "--env NCCL_DEBUG",
    ):
        assert option in line, option
    assert (docker.folder / "runs").is_dir()
    # The key goes by the environment; of this machine's places nothing goes in.
    assert "s3cret" not in line
    assert variables["WANDB_API_KEY"] == "s3cret"
    for absent in ("--network", "infiniband", "CUDA_HOME", "PRORES_VENV"):
        assert absent not in line


NOT_IN_THE_CONTAINER = {"PYTHON"}  # says where something is on this machine


def test_every_setting_of_the_launcher_goes_on_to_the_container(docker: Docker) -> None:
    table = (REPOSITORY / "docs/launch.md").read_text().partition("## Variables")[2]
    named = {
        name
        for cell in re.findall(r"^\| (`.*?) \|", table.partition("## Layouts")[0], flags=re.M)
        for name in re.findall(r"`([A-Z_]+)`", cell)
    } - NOT_IN_THE_CONTAINER
    assert len(named) > 30
    settings = dict.fromkeys(named, "1") | {"NODE_RANK": "0", "DATA_DIR": ".", "RUN_DIR": "."}
    line, _ = docker.called("true", **settings)
    assert {name for name in named if f"--env {name} " not in line} == set()


def test_more_nodes(docker: Docker) -> None:
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node1"}
    line, variables = docker.called("examples/pretrain_1b.sh", **nodes)
    for option in ("--network host", "--cap-add IPC_LOCK", "--env NNODES", "--env NODE_RANK"):
        assert option in line
    assert ("--device /dev/infiniband" in line) == Path("/dev/infiniband").is_dir()
    assert (variables["NODE_RANK"], variables["MASTER_ADDR"]) == ("1", "node1")


def test_more_nodes_inside_of_slurm(docker: Docker) -> None:
    scontrol = docker.bin / "scontrol"
    scontrol.write_text("#!/bin/sh\n[ \"$*\" = 'show hostnames n[7-8]' ] && printf 'n7\\nn8\\n'\n")
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "31", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
    line, variables = docker.called("true", **slurm, SLURM_JOB_NODELIST="n[7-8]")
    assert "--network host" in line
    assert (variables["NODE_RANK"], variables["MASTER_ADDR"]) == ("1", "n7")
    assert variables["MASTER_PORT"] == "15031"


def test_folders_gpus_and_shared_memory_of_the_users_choice(docker: Docker) -> None:
    more = docker.folder / "more"
    more.mkdir()
    line, variables = docker.called(
        "true", GPUS="0,1", SHM_SIZE="16g", DATA_DIR="more", RUN_DIR="here", MOUNTS=str(more),
        CUDA_VISIBLE_DEVICES="2,3",
    )  # fmt: skip
    assert '--gpus "device=0,1"' in line
    assert "--shm-size 16g" in line
    assert "--ipc" not in line
    assert f"source={more},target={more}" in line
    assert f"source={docker.folder}/here,target={docker.folder}/here" in line
    assert variables["DATA_DIR"] == str(more)
    assert "CUDA_VISIBLE_DEVICES" not in line
    assert "--gpus" not in docker.called("true", GPUS="none")[0]


def test_the_exit_code_is_the_runs(docker: Docker) -> None:
    assert docker.run("true", STAND_IN_CODE="75").returncode == 75


def test_a_dry_run_prints_what_would_be_run_and_makes_nothing(docker: Docker) -> None:
    result = docker.run(
        "--dry-run", "examples/pretrain_130m.sh", GPUS="0,1", WANDB_API_KEY="s3cret"
    )
    assert result.returncode == 0
    assert not docker.record.exists()
    assert list(docker.folder.iterdir()) == []
    assert "s3cret" not in result.stdout
    # What it prints can be pasted.
    path = f"{docker.bin}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", result.stdout], check=True, env={**os.environ, "PATH": path})
    arguments, _ = json.loads(docker.record.read_text())
    assert arguments[0] == "run"
    assert arguments[-2:] == ["bash", "examples/pretrain_130m.sh"]
    assert '"device=0,1"' in arguments


@pytest.mark.parametrize(
    ("words", "settings", "told"),
    [
        ((), {}, ("command",)),
        (("true",), {"NNODES": "0"}, ("NNODES=0",)),
        (("true",), {"NNODES": "2"}, ("NODE_RANK", "0 to 1")),
        (("true",), {"NNODES": "2", "NODE_RANK": "2"}, ("NODE_RANK=2", "0 to 1")),
        (("true",), {"NNODES": "2", "NODE_RANK": "0"}, ("MASTER_ADDR",)),
        (("true",), {"GPUS": "two"}, ("GPUS=two",)),
        (("true",), {"SHM_SIZE": "much"}, ("SHM_SIZE=much",)),
        (("true",), {"STOP_SECONDS": "soon"}, ("STOP_SECONDS=soon",)),
        (("true",), {"DATA_DIR": "/nowhere"}, ("DATA_DIR=/nowhere", "no such folder")),
        (("true",), {"MOUNTS": "here"}, ("MOUNTS", "here", "absolute")),
    ],
)
def test_a_wrong_setting_is_one_line(
    words: tuple[str, ...], settings: dict[str, str], told: tuple[str, ...], docker: Docker
) -> None:
    result = docker.run(*words, **settings)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in told), line
    assert not docker.record.exists()


def test_without_docker_it_says_so(docker: Docker) -> None:
    (docker.bin / "docker").unlink()
    for name in ("bash", "dirname"):
        (docker.bin / name).symlink_to(f"/bin/{name}" if name == "bash" else f"/usr/bin/{name}")
    result = subprocess.run(
        [str(docker.bin / "bash"), str(REPOSITORY / "examples/docker/run.sh"), "true"],
        env={"PATH": str(docker.bin)}, capture_output=True, text=True, cwd=docker.folder,
    )  # fmt: skip
    assert result.returncode == 2
    assert "no docker command" in result.stderr


def test_every_command_of_the_documentation_runs(docker: Docker, tmp_path: Path) -> None:
    clone = make_clone(tmp_path / "clone")
    path = f"{Path(sys.executable).parent}:{docker.bin}:{environment()['PATH']}"
    settings = {"PATH": path, "PYTHONPATH": str(clone), "WANDB_MODE": "offline"}
    assert len(BLOCKS) == 5
    script = "\n".join(["set -euo pipefail", *BLOCKS])
    result = run(["bash", "-c", script], clone, **settings)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "Ready for cpu." in result.stdout
    assert result.stdout.count("docker run ") == 2
