"""Around Megatron's saving: a manifest with every checkpoint, and one clear line where it fails."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_prores.checkpoint import manifest, safe_load
from megatron_prores.checkpoint.manifest import DamagedError, Manifest
from megatron_prores.checkpoint.newest import newest
from megatron_prores.checkpoint.reader import FORMAT
from megatron_prores.checkpoint.verify import newest_intact
from megatron_prores.errors import StopRun, print_own_error
from megatron_prores.system.files import sync

REMOTE = "msc://"
"""Megatron's multi-storage paths; not files of this machine, so neither verified nor hashed."""

_TRACKER_SECONDS = 30.0
"""How long the last rank waits for rank 0's tracker file; file servers show it to others late."""


def save(stock: Callable[..., Any], named: dict[str, Any]) -> Any:
    """Write a manifest with every checkpoint, once all of its files are written."""
    if str(named["checkpoint_dir"]).startswith(REMOTE):
        return stock()
    directory = Path(str(named["checkpoint_dir"]))
    # Megatron's own manifest has the same name and no sizes, and one rank reads all files for it.
    request = stock(verify_integrity=False)
    if request is None:
        write_together(directory)
        return None
    rank = torch.distributed.get_rank()
    (directory / _part(rank)).unlink(missing_ok=True)  # of an earlier saving that was interrupted
    if request.async_fn is not None:
        request = request._replace(
            async_fn=partial(write_and_hash, request.async_fn, directory, rank)
        )
    # Before the tracker file, whose writing is added after this returns.
    request.add_finalize_fn(lambda: write_together(directory))
    return request


def write_and_hash(
    write: Callable[..., None], directory: Path, rank: int, *args: Any, **kwargs: Any
) -> None:
    """Write this rank's files of a checkpoint, and then their part of the manifest.

    For ``--async-save``: it runs in the process that writes, beside training. What cannot be hashed
    here is hashed when the manifest is put together.

    Args:
        write: Megatron's function that writes them.
        directory: Of one iteration.
        rank: The rank of the training process.
        *args: For ``write``.
        **kwargs: For ``write``.
    """
    write(*args, **kwargs)
    # An exception would end this process, and training would wait for it in vain.
    with contextlib.suppress(Exception):
        names = [name for name in manifest.file_names(directory) if _writer(name) == rank]
        manifest.write(directory, manifest.digests(directory, names), _part(rank))


def write_together(directory: Path) -> None:
    """Write the manifest of a checkpoint, each rank hashing those of its files that are not yet.

    Collective over all ranks.

    Args:
        directory: Of one iteration, with all files written.

    Raises:
        OSError: On every rank, when any cannot read its files or the manifest cannot be written.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    entries: Manifest = {}
    problem = ""
    try:
        with contextlib.suppress(DamagedError):
            entries = manifest.read(directory, _part(rank)) or {}
        # Files of no rank, and of an earlier saving by more ranks, are rank 0's.
        owners = {name: _writer(name) for name in manifest.file_names(directory)}
        mine = [name for name, owner in owners.items() if (owner if owner < ranks else 0) == rank]
        entries |= manifest.digests(directory, [name for name in mine if name not in entries])
    except OSError as error:
        problem = str(error)
    shares: list[tuple[Manifest, str]] = [({}, "")] * ranks
    torch.distributed.all_gather_object(shares, (entries, problem))
    problem = next((words for _, words in shares if words), "")
    if rank == 0 and not problem:
        try:
            if (form := directory / FORMAT).exists():
                sync(form)  # the only file that neither Megatron nor torch waits for
            whole = {name: entry for part, _ in shares for name, entry in part.items()}
            manifest.write(directory, whole, order=manifest.next_order(directory.parent))
            for part in directory.glob(f"{_part('*')}*"):
                part.unlink(missing_ok=True)
        except OSError as error:
            problem = str(error)
    outcome = [problem]
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[0]:
        raise OSError(outcome[0])


def _part(rank: int | str) -> str:
    """Name the file with a rank's part of the manifest; as a temporary one it is in no manifest."""
    return f".{rank}.{manifest.NAME}.tmp"


def _writer(name: str) -> int:
    """Return the rank that wrote a file, which is in its node's cache; rank 0 for the index."""
    match = re.match(r"__(\d+)_", name)
    return int(match[1]) if match else 0


def keep_reason(stock: Callable[..., Any], named: dict[str, Any]) -> Any:
    """Keep the reason why a file could not be written.

    Megatron passes on no more of a failure than the name of its class, as text. So it gets a class
    with the reason for its name.

    Returns:
        As ``FileSystemWriterAsync.write_preloaded_data``: the worker, and its results or failure.
    """
    worker, outcome = stock()
    if isinstance(outcome, Exception):
        # torch's writer trips over what the disk did not take, and complains about that.
        chain: BaseException | None = outcome
        while chain is not None and not isinstance(chain, OSError):
            chain = chain.__cause__ or chain.__context__
        outcome = type(str(chain or outcome), (RuntimeError,), {"__module__": "builtins"})()
    return worker, outcome


def report_failure(stock: Callable[..., Any], named: dict[str, Any]) -> Any:
    """End the run with one clear line where a checkpoint cannot be saved, as on a full disk."""
    try:
        return stock()
    except BaseException as error:  # torch's CheckpointException is no Exception
        together = type(error).__name__ == "CheckpointException"
        cause = cause_of(error)
        if not together and not _is_unwritable(cause):
            raise
        from megatron.training import get_args

        which = f"of iteration {named['iteration']} " if "iteration" in named else ""
        reason = safe_load.describe(cause)
        if kept := re.search(r"<class '(.+)'>", reason):
            reason = kept[1]
        root = get_args().save
        message = f"--save {root}: the checkpoint {which}could not be saved: {reason}"
        rank = torch.distributed.get_rank()
        if rank == 0:
            message += f". {_kept(Path(root))}"
        elif not together:
            # Only this rank knows, and only the first one's words are shown.
            print_own_error(f"rank {rank}: {message}")
        raise StopRun(message) from error


def tell_wandb(stock: Callable[..., Any], named: dict[str, Any]) -> None:
    """Wait for the tracker file before W&B takes note of a checkpoint by it.

    The last rank makes that note while rank 0 writes the file: without waiting, the first
    checkpoint of a run may end it because the file is not there, and a later note may name the
    checkpoint before. A failure of W&B does not end the run: the checkpoint is saved.
    """
    from megatron.training.global_vars import get_wandb_writer

    if not get_wandb_writer():
        return
    tracker, iteration = str(named["tracker_filename"]), named["iteration"]
    if not tracker.startswith(REMOTE):
        deadline = time.monotonic() + _TRACKER_SECONDS
        while not _is_tracked(Path(tracker), iteration) and time.monotonic() < deadline:
            time.sleep(0.05)
    try:
        stock()
    except Exception as error:
        print(
            f"warning: W&B has not taken note of the checkpoint of iteration {iteration}, which is "
            f"saved: {safe_load.describe(error)}",
            file=sys.stderr,
            flush=True,
        )


def _is_tracked(tracker: Path, iteration: int) -> bool:
    try:
        return tracker.read_text().strip() == str(iteration)
    except OSError:
        return False


def _kept(root: Path) -> str:
    try:
        complete = newest(root)
        iteration = None if complete is None else complete.iteration
    except DamagedError:
        iteration = newest_intact(root)
    if iteration is None:
        return "No checkpoint was complete before it"
    return f"The last complete one is that of iteration {iteration}; nothing was deleted"


def cause_of(error: BaseException) -> BaseException:
    """Take the failure of the first rank out of torch's error about a failed checkpoint."""
    failures = getattr(error, "failures", None)
    if type(error).__name__ == "CheckpointException" and isinstance(failures, dict) and failures:
        cause: BaseException = next(iter(failures.values()))[0]
        return cause
    return error


def _is_unwritable(error: BaseException) -> bool:
    return isinstance(error, OSError) or "PytorchStreamWriter" in str(error)
