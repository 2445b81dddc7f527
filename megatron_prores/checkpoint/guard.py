"""In a training run: a manifest with every checkpoint, and no run from a damaged one.

The run stops on all ranks, with a line that names the newest intact checkpoint and the flag that
loads it. It does not take that one by itself: the iterations in between were paid for, and whether
they are gone is the user's to say. Nothing is ever deleted.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from megatron_prores.checkpoint import manifest, safe_load, saving, te_state
from megatron_prores.checkpoint.manifest import DamagedError, Manifest
from megatron_prores.checkpoint.newest import Newest, is_there, to_load
from megatron_prores.checkpoint.reader import (
    iterations,
)
from megatron_prores.checkpoint.saving import REMOTE, cause_of
from megatron_prores.checkpoint.verify import newest_intact, surface_damage
from megatron_prores.errors import UserError, print_own_error
from megatron_prores.system.environment import THIS_MACHINE, TargetEnvironment
from megatron_prores.upstream.registry import wrap

_SLOWEST_READ = 100e6
"""Bytes per second; how long the other ranks wait at most for the one that looks for an intact
checkpoint."""


def install() -> None:
    """Put the manifest and the verification into Megatron's saving and loading.

    Raises:
        RuntimeError: The installed Megatron has other signatures than those relied on.
    """
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.rerun_state_machine import Call, Caller
    from megatron.training import checkpointing, training, wandb_utils

    safe_load.install()
    # Tuples of names and numbers, which Megatron's own list lacks: in the checkpoint of a run that
    # ended with a bad result, to be looked at on another GPU.
    torch.serialization.add_safe_globals([Call, Caller])
    te_state.install()
    needs = ("checkpoint_dir", "async_sharded_save", "verify_integrity")
    wrap(dist_checkpointing, "save", needs, saving.save)
    wrap(FileSystemWriterAsync, "write_preloaded_data", ("write_bucket",), saving.keep_reason)
    wrap(checkpointing, "_load_base_checkpoint", ("load_dir", "args", "rank0"), _load)
    wrap(checkpointing, "checkpoint_exists", ("checkpoints_path",), _exists)
    wrap(training, "save_checkpoint", ("iteration",), saving.report_failure)
    noted = ("tracker_filename", "iteration")
    wrap(wandb_utils, "on_save_checkpoint_success", noted, saving.tell_wandb)
    wrap(training, "maybe_finalize_async_save", (), saving.report_failure)


def check_paths(args: Any, target: TargetEnvironment = THIS_MACHINE) -> None:
    """Refuse a run whose checkpoint to load is damaged, or whose ``--save`` cannot be written.

    To be called before anything of the checkpoint is read. Sees what can be seen without reading
    the large files; these follow when the ranks can share the work.

    Args:
        args: Parsed, not yet validated by Megatron.
        target: The machine of the run.

    Raises:
        UserError: Names the file, and the newest intact checkpoint with the flag that loads it.
    """
    if args.save is not None and not args.save.startswith(REMOTE):
        target.check_writable("--save", args.save)
    for flag, root in (
        ("--load", args.load),
        ("--pretrained-checkpoint", args.pretrained_checkpoint),
    ):
        if root is None or root.startswith(REMOTE):
            continue
        choice, damage = None, []
        try:
            choice = to_load(Path(root), args.ckpt_step)
            if choice is not None:
                damage = surface_damage(choice.directory)
        except DamagedError as error:
            damage = [str(error)]
        if damage and target.is_elsewhere(root):
            target.note(f"{root}: not here; no checkpoint was looked at")
        elif damage:
            directory = None if choice is None else choice.directory
            _stop_alone(f"{flag} {root}", Path(root), directory, damage)
        if choice is not None:
            if choice.note and _rank() == 0:
                print(f"> {flag} {root}: {choice.note}", flush=True)
            return


def _verdict(flag: str, root: Path, directory: Path | None, damage: list[str]) -> str:
    """Write the refusal. Looks for the newest intact checkpoint, which may take a while."""
    what = damage[0] + (f" (and {len(damage) - 1} more)" if len(damage) > 1 else "")
    if directory is not None:
        what = f"the checkpoint {directory.name} is damaged: {what}"
    intact = newest_intact(root, directory) if root.is_dir() else None
    advice = (
        f"the newest intact checkpoint is that of iteration {intact}: load it with "
        f"--ckpt-step {intact}"
        if intact is not None
        else "no intact checkpoint is there"
    )
    return f"{flag}: {what}. Nothing was deleted; {advice}"


def _stop_alone(flag: str, root: Path, directory: Path | None, damage: list[str]) -> NoReturn:
    """Stop every rank before they can talk to each other; the first one says why."""
    if _rank() == 0:
        raise UserError(_verdict(flag, root, directory, damage))
    # A launcher ends all ranks with the first that ends: that one must have finished its search.
    found = iterations(root).values() if root.is_dir() else ()
    size = sum(file.stat().st_size for place in found for file in place.iterdir() if file.is_file())
    time.sleep(2 + size / _SLOWEST_READ)
    raise UserError(f"{flag}: {damage[0]}")


def _rank() -> int:
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def verify_together(flag: str, root: Path, directory: Path, hashes: bool) -> None:
    """Verify the checkpoint to load, each rank a share of it. Collective over all ranks.

    Args:
        flag: What the user named the checkpoint with, for the message.
        root: The directory that it named.
        directory: The checkpoint.
        hashes: Whether to compare the content of all files, not only their sizes.

    Raises:
        UserError: On every rank, when any has found damage.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    known: list[tuple[list[str], Manifest | None]] = [([], None)]
    if rank == 0 and not (damage := surface_damage(directory)):
        known = [([], manifest.read(directory))]
    elif rank == 0:
        known = [(damage, None)]
    torch.distributed.broadcast_object_list(known, src=0)
    damage, expected = known[0]
    if not damage and expected is not None and hashes:
        mine = manifest.wrong_content(directory, expected, manifest.share(expected, rank, ranks))
        shares: list[list[str]] = [[]] * ranks
        torch.distributed.all_gather_object(shares, mine)
        damage = sorted({each for one in shares for each in one})
    elif not damage and expected is None and rank == 0:
        print(f"> {directory} has no {manifest.NAME}: only names and sizes of its files verified")
    if damage:
        words = [_verdict(flag, root, directory, damage) if rank == 0 else ""]
        torch.distributed.broadcast_object_list(words, src=0)
        raise UserError(words[0])


_verified: set[Path] = set()


def _exists(stock: Callable[..., bool], named: dict[str, Any]) -> bool:
    """Say that there is a checkpoint also where the tracker file is yet to be written."""
    root = named["checkpoints_path"]
    return stock() or (root is not None and not root.startswith(REMOTE) and is_there(Path(root)))


def _load(stock: Callable[..., Any], named: dict[str, Any]) -> Any:
    """Verify a checkpoint before it is loaded, and say in one line what cannot be read."""
    args, root = named["args"], named["load_dir"]
    if root is None or root.startswith(REMOTE):
        return stock()
    flag = ("--load " if root == args.load else "--pretrained-checkpoint ") + root
    try:
        choice = _agreed(Path(root), getattr(args, "ckpt_step", None))
    except DamagedError as error:
        _stop_alone(flag, Path(root), None, [str(error)])
    if choice is None:
        return stock()
    directory = choice.directory
    if torch.distributed.is_initialized() and directory not in _verified:
        verify_together(flag, Path(root), directory, args.prores_verify_checkpoint == "hashes")
        _verified.add(directory)
    if choice.note:
        # Megatron itself knows no newer one than the tracker file names.
        args = copy.copy(args)
        args.ckpt_step = choice.iteration
    try:
        return stock(args=args)
    except BaseException as error:  # torch's CheckpointException is no Exception
        cause = cause_of(error)
        if not _is_unreadable(cause):
            raise
        message = f"{flag}: {directory.name} cannot be read: {safe_load.describe(cause)}"
        if _rank() != 0:
            # Perhaps only here; errors of other ranks are else not shown.
            print_own_error(f"rank {_rank()}: {message}")
        raise UserError(message) from error


def _agreed(root: Path, step: int | None) -> Newest | None:
    """Choose the checkpoint to load, on rank 0 for all: a file server may show others less."""
    if not torch.distributed.is_initialized():
        return to_load(root, step)
    choice: list[Newest | DamagedError | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            choice = [to_load(root, step)]
        except DamagedError as error:
            choice = [error]
    torch.distributed.broadcast_object_list(choice, src=0)
    if isinstance(choice[0], DamagedError):
        raise choice[0]
    return choice[0]


def _is_unreadable(error: BaseException) -> bool:
    kinds = (pickle.UnpicklingError, EOFError, OSError, zipfile.BadZipFile)
    words = (json.JSONDecodeError, UnicodeDecodeError)
    torchs = ("PytorchStreamReader", "metadata read failed")
    return isinstance(error, (*kinds, *words)) or any(each in str(error) for each in torchs)
