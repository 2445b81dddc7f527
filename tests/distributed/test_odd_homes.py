"""Runs at home where no developer is: what a cluster's users, folders and limits may be like."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_prores.checkpoint.verify import verify
from tests.distributed.launch import free_port, launcher_variables, run_job
from tests.distributed.test_lifecycle import MODEL, tracked
from tests.examples.clone import make_clone

ALONE = [*MODEL[: MODEL.index("--pipeline-model-parallel-size")], "--num-workers", "1"]
FLAGS = [*ALONE, "--train-iters", "2", "--save-interval", "1"]


def as_somebody_else() -> list[str]:
    """A command that runs another as a user who may not do more than the files' modes say."""
    if os.geteuid() != 0:
        return []
    command = ["unshare", "--user", "--map-user=1234", "--map-group=1234"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"]).returncode:
        pytest.skip("root, and no user namespace can be made here")
    return command


def test_a_run_from_a_read_only_clone_without_a_home(tmp_path: Path) -> None:
    # All of it at once: where it works so, each of it works.
    user = as_somebody_else()
    clone = make_clone(tmp_path / "clóne 試 of\nours")
    for path in [clone, *clone.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    disk = tmp_path / "disk"
    disk.mkdir()
    save = tmp_path / "my checkpoints é"
    save.symlink_to(disk, target_is_directory=True)
    environment = {"PATH": os.environ["PATH"], "LANG": "C", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    environment |= launcher_variables(0, 1, free_port())
    argv = [*FLAGS, "--save", str(save), "--load", str(save), "--tensorboard-dir", str(disk / "tb")]
    result = subprocess.run(
        [*user, sys.executable, "-W", "ignore", str(clone / "pretrain_gpt_prores.py"), *argv],
        cwd=clone,
        env=environment,
        umask=0o077,
        capture_output=True,
        text=True,
        timeout=240,
    )
    for path in [clone, *clone.rglob("*")]:  # so that it can be removed
        path.chmod(path.stat().st_mode | 0o200)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert tracked(disk) == 2
    assert verify(disk / "iter_0000002").intact
    assert save.is_symlink()
    assert all(path.stat().st_mode & 0o077 == 0 for path in disk.rglob("*"))
    assert not list(clone.rglob("__pycache__"))


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "full"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a full file system cannot be mounted here")
    (place / "all of it").write_bytes(bytes(4096))
    yield place
    subprocess.run(["umount", str(place)], check=True)


@dataclass(frozen=True)
class FullTmpdir:
    path: str

    def __call__(self) -> None:
        import tempfile

        os.environ["TMPDIR"] = self.path
        tempfile.tempdir = None


@dataclass(frozen=True)
class FewFiles:
    limit: int

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (self.limit, self.limit))


def works_or_says_why(directory: Path, prepare: Callable[[], None], *words: str) -> None:
    argv = [*FLAGS, "--save", str(directory / "save")]
    job = run_job(directory / "job", argv, ranks=1, prepare=prepare)
    assert "Traceback" not in job.output, job.output[-3000:]
    if job.succeeded:
        assert verify(directory / "save" / "iter_0000002").intact
        return
    (line,) = job.errors
    for word in words:
        assert word in line


def test_a_full_tmpdir(full_disk: Path, tmp_path: Path) -> None:
    works_or_says_why(tmp_path, FullTmpdir(str(full_disk)), "TMPDIR")


def test_few_open_files(tmp_path: Path) -> None:
    works_or_says_why(tmp_path, FewFiles(64), "ulimit -n")
