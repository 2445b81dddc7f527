"""Atomic writes: a file is the old one or the new, never half."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file beside ``path`` that takes its place once it is complete and on the disk.

    Where writing fails, ``path`` is as it was, and the file beside it is removed.

    Args:
        path: The file to write.
        mode: "w" for text, "wb" for bytes.
    """
    beside = path.with_name(f"{path.name}.tmp")
    try:
        with beside.open(mode) as file:
            yield file
        publish(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def publish(finished: Path, path: Path) -> None:
    """Rename a finished file, so that a reader of ``path`` sees all of it or what was there before.

    Args:
        finished: A file on the file system of ``path``.
        path: Its name from now on; a file of that name is replaced.
    """
    # Without the first sync a machine crash after the rename could leave an empty file under the
    # final name; without the second, no name at all.
    sync(finished)
    os.replace(finished, path)
    try:
        sync(path.parent)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a network file system without it
            raise


def sync(path: Path) -> None:
    """Wait until what a file or a directory holds is on the disk.

    Raises:
        OSError: The disk did not take it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
