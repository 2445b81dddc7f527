"""What a run refuses to load, to restore or to save to, and that loading executes nothing."""

from __future__ import annotations

import io
import multiprocessing
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import validation
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint import FileSystemReader

from megatron_prores.checkpoint import guard, manifest, newest, safe_load
from megatron_prores.checkpoint.reader import TRACKER
from megatron_prores.checkpoint.saving import save, write_and_hash
from megatron_prores.command_line import saved_run as checkpoint
from megatron_prores.errors import UserError
from tests.unit import stored

SHARD = "__0_0.distcp"
DAMAGES = {"flipped": stored.flip_bit, "truncated": stored.truncate, "missing": Path.unlink}


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> None:
    stored.unguard_loading(monkeypatch)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints, of iterations 2 and 4."""
    return stored.make_two(tmp_path / "saved")


def flags(root: Path, **more: Any) -> Namespace:
    """A command line that loads from a directory."""
    absent = ("pretrained_checkpoint", "save", "ckpt_step", "hybrid_layer_pattern")
    return Namespace(**{**dict.fromkeys(absent), "load": str(root), **more})


def test_run_restores_no_code_from_a_checkpoint(tmp_path: Path) -> None:
    settings = {"--prores-schedule": "harmful:alpha"}
    root = tmp_path / "saved"
    stored.make(root, 2, prores_schedule="harmful:alpha", prores_settings=settings)
    args = flags(root, use_checkpoint_args=True, num_layers=None)
    saved = checkpoint.find_saved_run(args)
    assert saved is not None
    with pytest.raises(UserError, match="no code runs because a checkpoint names it"):
        checkpoint.restore_flags(args, saved, explicit=set())
    assert "prores_schedule" not in checkpoint.restore_flags(args, saved, {"prores_schedule"})


def test_torchs_own_reading_is_safe_once_installed(root: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    data = stored.payload(marker, as_torch=True)
    stored.plant(root / "iter_0000004", ".metadata", marker)
    safe_load.install()
    assert FileSystemReader(root / "iter_0000002").read_metadata().storage_data
    with pytest.raises(safe_load.RefusedError, match=r"io\.open"):
        FileSystemReader(root / "iter_0000004").read_metadata()
    (tmp_path / "file.pt").write_bytes(data)
    with pytest.raises(pickle.UnpicklingError, match=r"io\.open"):
        torch.load(tmp_path / "file.pt", weights_only=False)
    assert not marker.exists()


def test_safe_loading_fails_clearly_when_torch_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(FileSystemReader, "read_metadata", lambda self: None)
        with pytest.raises(RuntimeError, match=r"FileSystemReader\.read_metadata has no pickle"):
            safe_load.install()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: None)
        with pytest.raises(RuntimeError, match=r"torch\.load does not heed"):
            safe_load.install()


@pytest.mark.parametrize("attack", ["os.system", "builtins.eval", "torch.load", "torch.hub.load"])
def test_index_allows_no_function(attack: str) -> None:
    module, _, name = attack.rpartition(".")
    data = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode()
    data += b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    with pytest.raises(pickle.UnpicklingError, match=attack):
        safe_load.load_index(io.BytesIO(data))


@pytest.mark.parametrize(
    "name",
    [
        "write_preloaded_data",
        "_load_base_checkpoint",
        "save_checkpoint",
        "maybe_finalize_async_save",
    ],
)
def test_guard_fails_clearly_when_megatron_moves(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import checkpointing, training

    for owner, each in (
        (FileSystemWriterAsync, "write_preloaded_data"),
        (dist_checkpointing, "save"),
        (checkpointing, "_load_base_checkpoint"),
        (training, "save_checkpoint"),
        (training, "maybe_finalize_async_save"),
    ):
        monkeypatch.setattr(owner, each, getattr(owner, each))
        if each == name:
            monkeypatch.delattr(owner, each)
    with pytest.raises(RuntimeError, match=rf"has moved: .*\.{name} "):
        guard.install()


def test_manifest_is_also_megatrons(root: Path) -> None:
    assert manifest.NAME == validation.INTEGRITY_FNAME
    validation.verify_integrity_manifest(str(root / "iter_0000004"))
    stored.flip_bit(root / "iter_0000004" / SHARD)
    with pytest.raises(validation.CheckpointingException, match=SHARD):
        validation.verify_integrity_manifest(str(root / "iter_0000004"))
    # The other way round: one that Megatron wrote has no sizes.
    validation.save_integrity_manifest(str(root / "iter_0000002"))
    read = manifest.read(root / "iter_0000002")
    assert read is not None
    assert read[SHARD].size is None
    assert not manifest.wrong_sizes(root / "iter_0000002", read)


def test_writer_that_is_not_forked_hashes_what_it_has_written(root: Path) -> None:
    directory = root / "iter_0000004"
    arguments = (print, directory, 0, "written")
    writer = multiprocessing.get_context("spawn").Process(target=write_and_hash, args=arguments)
    writer.start()
    writer.join(120)
    assert writer.exitcode == 0
    part = manifest.read(directory, ".0.integrity.json.tmp")
    assert part == manifest.digests(directory, manifest.file_names(directory))
    assert {SHARD, ".metadata", "metadata.json"} == part.keys()


def test_writer_that_cannot_hash_does_not_fail(tmp_path: Path) -> None:
    write_and_hash(print, tmp_path / "missing", 0, "written")


def test_part_of_an_interrupted_saving_is_not_taken(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = root / "iter_0000004"
    write_and_hash(print, directory, 0, "written")
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    request = AsyncRequest(None, (), [])
    assert save(lambda **_: request, {"checkpoint_dir": directory}) is request
    assert manifest.read(directory, ".0.integrity.json.tmp") is None
    assert len(request.finalize_fns) == 1


def test_shares_are_disjoint_and_complete() -> None:
    files = {f"{n}": manifest.Entry(size=n, sha256="") for n in range(11)}
    shares = [manifest.share(files, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(files)
    loads = [sum(files[name].size or 0 for name in share) for share in shares]
    assert max(loads) - min(loads) <= 2


# What is flipped in the large files is seen by hashing (tests/distributed).
@pytest.mark.parametrize(
    ("name", "how"),
    [
        (SHARD, "truncated"),
        (SHARD, "missing"),
        *((name, how) for name in (".metadata", "metadata.json") for how in DAMAGES),
        ("integrity.json", "truncated"),
    ],
)
def test_run_refuses_what_is_damaged_at_first_sight(name: str, how: str, root: Path) -> None:
    DAMAGES[how](root / "iter_0000004" / name)
    before = stored.snapshot(root)
    with pytest.raises(UserError, match="iter_0000004 is damaged") as refusal:
        guard.check_paths(flags(root))
    assert "newest intact checkpoint is that of iteration 2: load it with --ckpt-step 2" in str(
        refusal.value
    )
    guard.check_paths(flags(root, ckpt_step=2))
    assert stored.snapshot(root) == before


def test_run_refuses_a_file_that_has_grown(root: Path) -> None:
    with (root / "iter_0000004" / SHARD).open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=rf"{SHARD} has \d+ bytes instead of \d+.*--ckpt-step 2"):
        guard.check_paths(flags(root))


def test_run_names_the_newest_intact_one_not_the_newest_but_one(root: Path) -> None:
    stored.make(root, 6)
    stored.truncate(root / "iter_0000006" / SHARD)
    stored.flip_bit(root / "iter_0000004" / SHARD)
    with pytest.raises(UserError, match="--ckpt-step 2"):
        guard.check_paths(flags(root))
    stored.flip_bit(root / "iter_0000002" / SHARD)
    with pytest.raises(UserError, match="no intact checkpoint is there"):
        guard.check_paths(flags(root))


@pytest.mark.parametrize("content", ["", "abc", "-3", "\0"])
def test_run_refuses_a_damaged_tracker(content: str, root: Path) -> None:
    (root / TRACKER).write_text(content)
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration\.txt.*--ckpt-step 4"):
        guard.check_paths(flags(root))
    guard.check_paths(flags(root, ckpt_step=4))


def test_run_refuses_a_lost_tracker_where_no_manifest_proves_what_is_newest(root: Path) -> None:
    (root / TRACKER).unlink()
    (root / "iter_0000004" / "integrity.json").write_text("half of it")
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration\.txt.*--ckpt-step 2"):
        guard.check_paths(flags(root))


def sign(root: Path, *iterations: int) -> None:
    """Lets checkpoints have been saved in this order."""
    for order, iteration in enumerate(iterations, start=1):
        directory = root / f"iter_{iteration:07d}"
        names = manifest.file_names(directory)
        manifest.write(directory, manifest.digests(directory, names), order=order)


@pytest.mark.parametrize(
    ("saved", "tracked", "expected"),
    [
        ((2, 4, 6), "6", 6),
        ((2, 4, 6), "4", 6),
        ((2, 4, 6), None, 6),
        # The user went back to 2 and trained on.
        ((2, 6, 4), "4", 4),
        ((2, 6, 4), "6", 4),
        ((2, 6, 4), None, 4),
        # Manifests from before they had an order.
        ((), "4", 6),
        ((), None, 6),
    ],
)
def test_a_run_goes_on_from_the_checkpoint_that_was_completed_last(
    saved: tuple[int, ...],
    tracked: str | None,
    expected: int,
    root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stored.make(root, 6)
    sign(root, *saved)
    (root / TRACKER).unlink()
    if tracked is not None:
        (root / TRACKER).write_text(tracked)
    choice = newest.newest(root)
    assert choice is not None
    assert choice.iteration == expected
    guard.check_paths(flags(root))
    told = capsys.readouterr().out
    assert (f"of iteration {expected} is newer" in told) == (tracked != str(expected))


def test_a_newer_one_that_its_manifest_contradicts_is_passed_over(root: Path) -> None:
    sign(root, 2, 4)
    (root / TRACKER).write_text("2")
    stored.truncate(root / "iter_0000004" / SHARD)
    assert newest.newest(root) == newest.Newest(root / "iter_0000002")
    # Stock Megatron went on from it, and writes no manifest.
    stored.make(root, 3)
    (root / "iter_0000003" / "integrity.json").unlink()
    assert newest.newest(root) == newest.Newest(root / "iter_0000003")


def test_run_refuses_an_iteration_that_is_not_there(root: Path) -> None:
    with pytest.raises(UserError, match="iter_0000003 is damaged: its directory is missing"):
        guard.check_paths(flags(root, ckpt_step=3))


def test_first_saving_that_was_interrupted_is_no_checkpoint(tmp_path: Path) -> None:
    directory = stored.make(tmp_path / "saved", 2)
    (directory / "integrity.json").unlink()
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").unlink()
    guard.check_paths(flags(tmp_path / "saved"))
    (directory / "metadata.json").unlink()
    guard.check_paths(flags(tmp_path / "saved"))


def test_run_refuses_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UserError, match="is not a directory"):
            guard.check_paths(flags(tmp_path, save=str(place)))
    guard.check_paths(flags(tmp_path, save=str(tmp_path / "new" / "deeper")))
    assert not (tmp_path / "new").exists()
