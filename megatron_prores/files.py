"""Files that are the old one or the new, never half."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[TextIO]:
    """Open a text file beside ``path`` that takes its place once it is complete and on the disk.

    Where writing fails, ``path`` is as it was.
    """
    beside = path.with_name(f"{path.name}.new")
    with beside.open("w") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
