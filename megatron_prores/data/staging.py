"""A folder for outputs that are not finished, so that they appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_prores.errors import UserError

_LOCK_NAME = "lock"
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)


def refuse_existing(paths: Sequence[Path], overwrite: bool) -> None:
    """Stop before any work when an output is already there.

    Args:
        paths: The final names of the run's outputs.
        overwrite: The user's ``--overwrite``: existing outputs may be replaced.

    Raises:
        UserError: A path exists and ``overwrite`` is off, or a path is a folder.
    """
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder, and the output would take its name")
        if path.exists() and not overwrite:
            raise UserError(f"{path} already exists; choose another name or pass --overwrite")


class BusyError(UserError):
    """Another run is writing the same output."""


@contextmanager
def staging_directory(final: Path, wait: bool = False) -> Iterator[Path]:
    """Make a folder beside ``final`` to write in, owned by this run alone and removed at its end.

    It lies on the file system of the final name, so that ``files.publish`` is a rename. What a
    killed run left in it is cleared first: the lock dies with its owner, hence whoever holds it
    knows that everything else in the folder is stale.

    Args:
        final: The name, or the common start of the names, under which the outputs will appear. Its
            parent folder is made if missing.
        wait: Wait for another run that writes the same output.

    Yields:
        The folder, holding nothing but its lock file.

    Raises:
        UserError: The folder cannot be made or written.
        BusyError: Another run is writing the same output.
    """
    staging = staging_path(final)
    try:
        lock = _lock(staging, wait)
        for leftover in staging.iterdir() if lock is not None else ():
            if leftover.name != _LOCK_NAME:
                _remove(leftover)
    except OSError as error:
        raise UserError(f"cannot write in {final.parent or '.'}: {error.strerror}") from error
    if lock is None:
        raise BusyError(f"another run is writing {final} now; let it finish, or stop it first")
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def staging_path(final: Path) -> Path:
    """Return the folder that :func:`staging_directory` makes for an output."""
    return final.with_name(f".{final.name}.staging")


def _lock(staging: Path, wait: bool) -> int | None:
    """Return an open descriptor that holds the folder's lock, or None when another run has it."""
    while True:
        staging.mkdir(parents=True, exist_ok=True)
        lock_path = staging / _LOCK_NAME
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # A POSIX lock, unlike flock, is not inherited across fork: orphaned workers of a killed
            # run do not keep it.
            fcntl.lockf(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in _HELD_BY_ANOTHER:
                os.close(lock)
                return None
            # Some network file systems have no locks; there, two runs at once are the user's care.
        # The previous owner may have removed the folder between our open and our lock.
        if lock_path.exists() and os.path.samestat(os.fstat(lock), lock_path.stat()):
            return lock
        os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
