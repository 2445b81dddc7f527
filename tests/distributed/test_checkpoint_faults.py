"""Runs on damaged, malicious and unwritable checkpoints: a clear end, and nothing else is lost."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron_prores.checkpoint import manifest, verify
from tests.distributed import faults
from tests.distributed.conftest import MODEL, WARMUP, Text
from tests.distributed.launch import Job, run_job
from tests.unit import stored

MOCK = "--mock-data --tokenizer-type NullTokenizer --vocab-size 255 --num-workers 0".split()
FLAGS = [*MODEL, *WARMUP, "--eval-iters", "1", "--use-distributed-optimizer"]
FLAGS += ["--dist-ckpt-optim-fully-reshardable"]
NEWEST = "iter_0000004"


def flags(*more: object) -> list[str]:
    return [*FLAGS, *MOCK, "--train-iters", "4", *map(str, more)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run of two ranks that has saved iterations 2 and 4; not to be changed."""
    root = tmp_path_factory.mktemp("original")
    job = run_job(root, flags("--save", root / "saved", "--save-interval", 2), ranks=2)
    assert job.succeeded, job.output[-3000:]
    return job


@pytest.fixture
def saved(original: Job, tmp_path: Path) -> Path:
    """A copy of its checkpoints, to damage."""
    shutil.copytree(original.directory / "saved", tmp_path / "saved")
    return tmp_path / "saved"


def assert_refused(job: Job, *words: str) -> None:
    assert job.exit_codes == [2] * len(job.exit_codes), job.output[-3000:]
    lines = job.errors
    assert len(lines) == 1, job.output[-3000:]
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in job.output


def test_every_checkpoint_is_saved_with_its_manifest(original: Job) -> None:
    for name in ("iter_0000002", NEWEST):
        report = verify.verify(original.directory / "saved" / name)
        assert report.intact, report.damage
        assert report.by_manifest
        assert report.tensors > 30


@pytest.mark.parametrize("damage", [stored.flip_bit, stored.truncate, Path.unlink])
def test_damaged_shard_stops_all_ranks(
    damage: Callable[[Path], None], saved: Path, tmp_path: Path
) -> None:
    damage(saved / NEWEST / "__1_0.distcp")
    before = stored.snapshot(saved)
    more = ("--load", saved, "--save", saved, "--save-interval", 2)
    job = run_job(tmp_path / "job", flags(*more), ranks=2)
    assert_refused(job, f"{NEWEST} is damaged: __1_0.distcp", "load it with --ckpt-step 2")
    after = stored.snapshot(saved)
    # Whatever else a run keeps in --save, the checkpoints are as they were.
    assert {name: after[name] for name in before} == before


def test_content_is_not_read_twice_where_the_user_says_so(saved: Path, tmp_path: Path) -> None:
    stored.flip_bit(saved / NEWEST / "__1_0.distcp")
    argv = flags("--load", saved, "--prores-verify-checkpoint", "sizes")
    job = run_job(tmp_path / "job", argv)
    assert job.succeeded, job.output[-3000:]


def test_checkpoint_without_a_manifest_loads_with_a_note(saved: Path, tmp_path: Path) -> None:
    (saved / NEWEST / "integrity.json").unlink()
    job = run_job(tmp_path / "job", flags("--load", saved))
    assert job.succeeded, job.output[-3000:]
    assert "has no integrity.json: only names and sizes" in job.output


def test_earlier_checkpoint_loads_with_the_flag_that_was_named(
    original: Job, saved: Path, tmp_path: Path
) -> None:
    stored.flip_bit(saved / NEWEST / "__0_0.distcp")
    (saved / "latest_checkpointed_iteration.txt").unlink()
    job = run_job(tmp_path / "without", flags("--load", saved))
    assert_refused(job, f"{NEWEST} is damaged: __0_0.distcp has changed", "--ckpt-step 2")
    job = run_job(tmp_path / "with", flags("--load", saved, "--ckpt-step", 2))
    assert job.succeeded, job.output[-3000:]
    losses = original.scalars("lm loss")
    assert job.scalars("lm loss") == pytest.approx({3: losses[3], 4: losses[4]}, rel=1e-5)


ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore".split()


@pytest.mark.parametrize(
    ("first", "later"), [([], ASYNC), (ASYNC, [])], ids=["first", "first asynchronous"]
)
def test_kill_between_manifest_and_tracker_loses_nothing(
    first: list[str], later: list[str], tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    tracker = saved / "latest_checkpointed_iteration.txt"

    def start(name: str, last: int, mode: list[str], kill_at: int) -> Job:
        argv = [*flags("--save", saved, "--load", saved, "--save-interval", 2), *mode]
        argv += ["--train-iters", str(last), "--override-opt-param-scheduler"]
        kill = faults.KillBeforeTheTrackerFile(kill_at)
        return run_job(tmp_path / name, argv, prepare=kill)

    job = start("first", 6, first, kill_at=1)
    assert job.exit_codes == [-signal.SIGKILL], job.output[-3000:]
    assert verify.verify(saved / "iter_0000002").intact
    assert not tracker.exists()

    job = start("later", 6, later, kill_at=2)
    assert job.exit_codes == [-signal.SIGKILL], job.output[-3000:]
    assert f"{tracker.name} is missing, but the checkpoint of iteration 2 is" in job.output
    assert min(job.scalars("lm loss")) == 3
    assert verify.verify(saved / "iter_0000006").intact
    assert tracker.read_text() == "4"

    job = start("end", 7, [], kill_at=0)
    assert job.succeeded, job.output[-3000:]
    assert "still names iteration 4 (which --ckpt-step 4 loads), but" in job.output
    assert list(job.scalars("lm loss")) == [7]
    assert tracker.read_text() == "7"


@pytest.mark.parametrize("where", stored.PLANTS)
def test_nothing_in_a_checkpoint_is_executed_by_a_run(
    where: str, saved: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    stored.plant(saved / NEWEST, where, marker)
    job = run_job(tmp_path / "job", flags("--load", saved))
    assert_refused(job, str(saved))
    if where in (".metadata", "arguments in a shard", "tensor in a shard", "common.pt"):
        assert "io.open, which no checkpoint needs" in job.output
    assert not marker.exists()


def test_nothing_beside_a_dataset_is_executed(text: Text, tmp_path: Path) -> None:
    marker, cache = tmp_path / "marker", tmp_path / "cache"
    argv = [*FLAGS, *text.flags, "--train-iters", "1", "--data-cache-path", str(cache)]
    assert run_job(tmp_path / "first", argv).succeeded
    found = sorted(cache.rglob("*.npy"))
    assert found
    for path in found:
        np.save(path, np.array([stored.Payload(marker)], dtype=object), allow_pickle=True)
    np.load(found[0], allow_pickle=True)
    marker.unlink()  # so it is a live one
    job = run_job(tmp_path / "second", argv)
    assert_refused(job, "is not the index of a dataset", "remove it")
    assert not marker.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for one checkpoint of 3.5 MB, not for two."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def assert_saving_failed(job: Job, reason: str, last: int) -> None:
    assert job.exit_codes == [1] * len(job.exit_codes), job.output[-3000:]
    lines = job.errors
    assert len(lines) == 1, job.output[-3000:]
    assert "the checkpoint of iteration 4 could not be saved" in lines[0]
    assert reason in lines[0]
    assert f"The last complete one is that of iteration {last}" in lines[0]
    assert "Traceback" not in job.output


def test_full_disk(small_disk: Path, tmp_path: Path) -> None:
    saving = flags("--save", small_disk, "--save-interval", 2)
    job = run_job(tmp_path / "job", saving, ranks=2)
    assert_saving_failed(job, "No space left on device", last=2)
    assert verify.verify(small_disk / "iter_0000002").intact
    resumed = run_job(tmp_path / "resumed", flags("--load", small_disk, "--exit-interval", 3))
    assert resumed.succeeded, resumed.output[-3000:]
    assert list(resumed.scalars("lm loss")) == [3]


def limit_file_size() -> None:
    """As a quota does: no file of this run can grow beyond 200 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_quota(saved: Path, tmp_path: Path) -> None:
    shutil.rmtree(saved / NEWEST)
    (saved / "latest_checkpointed_iteration.txt").write_text("2")
    argv = flags("--load", saved, "--save", saved, "--save-interval", 2)
    job = run_job(tmp_path / "job", argv, prepare=limit_file_size)
    assert_saving_failed(job, "File too large", last=2)
    assert verify.verify(saved / "iter_0000002").intact


@pytest.fixture
def read_only(saved: Path, tmp_path: Path) -> Iterator[Path]:
    """The checkpoints on a file system that cannot be written."""
    place = tmp_path / "read_only"
    place.mkdir()
    if os.geteuid() != 0:
        shutil.copytree(saved, place, dirs_exist_ok=True)
        place.chmod(0o555)
        yield place
        place.chmod(0o755)
        return
    if subprocess.run(["mount", "--bind", saved, place], capture_output=True).returncode != 0:
        pytest.skip("root writes everywhere, and nothing can be mounted here")
    subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_read_only_directory(read_only: Path, tmp_path: Path) -> None:
    job = run_job(tmp_path / "job", flags("--load", read_only, "--save", read_only))
    assert_refused(job, f"--save {read_only}", "cannot be written to")


@dataclass(frozen=True)
class NoteHashing:
    """Writes down, in every process of a rank, which files it hashes."""

    log: str

    def __call__(self) -> None:
        training, digest = os.getpid(), manifest.digest

        def noted(path: Path) -> manifest.Entry:
            process = "training" if os.getpid() == training else "writer"
            with open(self.log, "a") as file:
                file.write(f"{process} {path.name}\n")
            return digest(path)

        manifest.digest = noted


def test_async_saving_hashes_beside_training(tmp_path: Path) -> None:
    argv = flags("--save", tmp_path / "saved", "--save-interval", 2)
    argv += ASYNC
    log = tmp_path / "hashed"
    job = run_job(tmp_path / "job", argv, ranks=2, prepare=NoteHashing(str(log)))
    assert job.succeeded, job.output[-3000:]
    report = verify.verify(tmp_path / "saved" / NEWEST)
    assert report.intact, report.damage
    assert report.by_manifest
    names = {path.name for path in (tmp_path / "saved" / NEWEST).iterdir()}
    shards = {name for name in names if name.endswith(".distcp")}
    assert len(shards) >= 2
    assert names == {*shards, ".metadata", "metadata.json", "integrity.json"}
    # Each file once per checkpoint; training waits for two small ones, written when the rest is.
    by_writer = [f"writer {name}" for name in shards]
    by_training = ["training .metadata", "training metadata.json"]
    assert sorted(log.read_text().splitlines()) == sorted(2 * [*by_writer, *by_training])
