"""Around Megatron's saving: a manifest with every checkpoint, and clear words where it fails."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_prores.checkpoint import manifest, safe_load
from megatron_prores.checkpoint.manifest import DamagedError, Manifest
from megatron_prores.checkpoint.reader import tracked
from megatron_prores.checkpoint.verify import newest_intact
from megatron_prores.errors import StopRun

REMOTE = "msc://"
"""Megatron's multi-storage paths; not files of this machine, so neither verified nor hashed."""

_TRACKER_SECONDS = 30.0
"""How long the last rank waits for rank 0's tracker file; file servers show it to others late."""


def write_together(directory: Path) -> None:
    """Write the manifest of a checkpoint, each rank hashing its own files. Collective.

    Args:
        directory: Of one iteration, with all files written.

    Raises:
        OSError: On every rank, when any cannot read its files or the manifest cannot be written.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def owner(name: str) -> int:
        # A rank's own files are in its node's cache.
        match = re.match(r"__(\d+)_", name)
        return int(match[1]) if match and int(match[1]) < ranks else 0

    entries: Manifest = {}
    problem = ""
    try:
        for name in manifest.file_names(directory):
            if owner(name) == rank:
                entries[name] = manifest.digest(directory / name)
    except OSError as error:
        problem = str(error)
    shares: list[tuple[Manifest, str]] = [({}, "")] * ranks
    torch.distributed.all_gather_object(shares, (entries, problem))
    problem = next((words for _, words in shares if words), "")
    if rank == 0 and not problem:
        try:
            manifest.write(directory, {name: e for part, _ in shares for name, e in part.items()})
        except OSError as error:
            problem = str(error)
    outcome = [problem]
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[0]:
        raise OSError(outcome[0])


def save(stock: Callable[..., Any], named: dict[str, Any]) -> Any:
    """Around ``dist_checkpointing.save``: adds the manifest once all files are written."""
    if str(named["checkpoint_dir"]).startswith(REMOTE):
        return stock()
    directory = Path(str(named["checkpoint_dir"]))
    # Megatron's own manifest has the same name and no sizes, and one rank reads all files for it.
    request = stock(verify_integrity=False)
    if request is None:
        write_together(directory)
    else:
        # Before the tracker file, whose writing is added after this returns.
        request.add_finalize_fn(lambda: write_together(directory))
    return request


def keep_reason(stock: Callable[..., Any], named: dict[str, Any]) -> Any:
    """Around ``FileSystemWriterAsync.write_preloaded_data``, which gives (worker, its failure).

    Upstream passes on no more of a failure than the name of its class, as text. So it gets a class
    with the reason for its name.
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
    """Around Megatron's saving: a full disk or the like ends the run in clear words."""
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
            print(f"error: rank {rank}: {message}", file=sys.stderr, flush=True)
        raise StopRun(message) from error


def tell_wandb(stock: Callable[..., Any], named: dict[str, Any]) -> None:
    """Around Megatron's note of a checkpoint in W&B, an artifact that holds the tracker file.

    The last rank makes it while rank 0 writes that file: without waiting, the first checkpoint of a
    run may end it because the file is not there, and a later note may name the checkpoint before.
    A checkpoint is saved whether or not W&B takes note of it, so a failure does not end the run.
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
        newest = tracked(root)
    except DamagedError:
        newest = newest_intact(root)
    if newest is None:
        return "No checkpoint was complete before it"
    return f"The last complete one is that of iteration {newest}; nothing was deleted"


def cause_of(error: BaseException) -> BaseException:
    """Take the failure of the first rank out of torch's error about a failed checkpoint."""
    failures = getattr(error, "failures", None)
    if type(error).__name__ == "CheckpointException" and isinstance(failures, dict) and failures:
        cause: BaseException = next(iter(failures.values()))[0]
        return cause
    return error


def _is_unwritable(error: BaseException) -> bool:
    return isinstance(error, OSError) or "PytorchStreamWriter" in str(error)
