"""Which checkpoint of a directory a run goes on from.

Megatron names it in the tracker file, the last thing that it writes of a checkpoint. A run that is
killed just before has a complete checkpoint that nothing names but its manifest, which also has its
place in the order of saving: numbers of iterations have none, as a user may go back and train on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_prores.checkpoint import manifest
from megatron_prores.checkpoint.manifest import DamagedError
from megatron_prores.checkpoint.reader import (
    FORMAT,
    RELEASE,
    TRACKER,
    StoredCheckpoint,
    iteration_name,
    iterations,
    tracked,
)
from megatron_prores.checkpoint.verify import surface_damage


@dataclass(frozen=True)
class Newest:
    """The newest complete checkpoint of a directory."""

    directory: Path
    """Of its iteration; may be missing, where the tracker file names it all the same."""
    note: str = ""
    """What to tell the user where the tracker file does not name it; empty where it does."""

    @property
    def iteration(self) -> int | None:
        """Its number; None for "release"."""
        return None if self.directory.name == RELEASE else int(self.directory.name[5:])


def newest(root: Path) -> Newest | None:
    """Return the newest complete checkpoint, by its tracker file or by its manifest.

    Args:
        root: What ``--save`` named.

    Returns:
        None where there is no checkpoint, or only a first one whose saving was interrupted.

    Raises:
        DamagedError: The tracker file is damaged; or it is missing beside checkpoints that no
            manifest proves: Megatron would begin from the first iteration, and overwrite them.
    """
    named = tracked(root)
    found = iterations(root) if root.is_dir() else {}
    orders = {number: manifest.order(directory) for number, directory in found.items()}
    if named is None:
        if any(orders[n] is None and _is_finished(found[n]) for n in found):
            raise DamagedError(f"{TRACKER} is missing, though there are checkpoints")
        proven = [(order, number) for number, order in orders.items() if order is not None]
        return _proven(found, max(proven)[1], f"{TRACKER} is missing") if proven else None
    there = Newest(root / iteration_name(named))
    if isinstance(named, str) or (order_there := orders.get(named)) is None:
        return there
    # A manifest without a place in the order is older than that, or stock Megatron's.
    later = [
        (order, number)
        for number, order in orders.items()
        if order is not None and (order > order_there if order_there else number > named)
    ]
    for _, number in sorted(later, reverse=True):
        if not surface_damage(found[number]):
            why = f"{TRACKER} still names iteration {named} (which --ckpt-step {named} loads)"
            return _proven(found, number, why)
    return there


def to_load(root: Path, step: int | None) -> Newest | None:
    """Return the checkpoint that a run is going to load.

    Args:
        root: What ``--load`` names.
        step: ``--ckpt-step``.

    Returns:
        None where there is no checkpoint.

    Raises:
        DamagedError: As :func:`newest`.
    """
    return Newest(root / iteration_name(step)) if step else newest(root)


def is_there(root: Path) -> bool:
    """Return whether a directory holds a complete checkpoint, or a tracker file that says so."""
    try:
        return newest(root) is not None
    except DamagedError:
        return True


def _proven(found: dict[int, Path], number: int, why: str) -> Newest:
    return Newest(
        found[number],
        f"{why}, but the checkpoint of iteration {number} is newer and complete by its "
        f"{manifest.NAME}: it counts",
    )


def _is_finished(directory: Path) -> bool:
    """Whether a checkpoint without a readable manifest was saved to its end.

    One of a run of ours is the first one, whose saving was interrupted: nothing was lost but it.
    """
    if (directory / manifest.NAME).exists():
        return True
    if not (directory / FORMAT).exists():
        return False
    try:
        return not hasattr(StoredCheckpoint(directory).args, "prores_schedule")
    except DamagedError:
        return True
