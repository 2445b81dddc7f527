"""The manifest of a checkpoint, ``integrity.json``: the size and the sha256 of each of its files.

Neither torch's format nor Megatron's says whether a file still has the content that was written.
The manifest is the one that Megatron writes itself with ``--verify-integrity``, on one rank, with
sizes added, so that stock Megatron reads it too.

It protects against damage, not against malice: who can change a file can change the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_prores.system.files import atomic_write

NAME = "integrity.json"
_ALGORITHM = "sha256"
_THREADS = 8


class DamagedError(Exception):
    """A file of a checkpoint is not what it should be; says which and how."""


@dataclass(frozen=True)
class Entry:
    """One file."""

    size: int | None
    """In bytes; None where stock Megatron wrote the manifest."""
    sha256: str
    """Hexadecimal."""


type Manifest = dict[str, Entry]
"""Name of a file, relative to the checkpoint's directory -> what it should be."""


def digest(path: Path) -> Entry:
    """Read a file to its end.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, _ALGORITHM).hexdigest()
        return Entry(os.fstat(file.fileno()).st_size, sha256)


def digests(directory: Path, names: Iterable[str]) -> Manifest:
    """Read files to their end, in parallel.

    Raises:
        OSError: One cannot be read.
    """
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(digest, (directory / name for name in names))
        return dict(zip(names, found, strict=True))


def file_names(directory: Path) -> list[str]:
    """List the files that belong into a manifest."""
    return sorted(
        entry.name
        for entry in directory.iterdir()
        if entry.is_file() and entry.name != NAME and not entry.name.endswith(".tmp")
    )


def write(directory: Path, manifest: Manifest, name: str = NAME, order: int = 0) -> None:
    """Write the manifest of a finished checkpoint, or a part of it; all of it or nothing.

    Args:
        directory: Of one iteration.
        manifest: Its files.
        name: Of the manifest, or of a part.
        order: The place of the checkpoint in the order of saving, from 1; 0: not known.

    Raises:
        OSError: It cannot be written.
    """
    content = {
        "algorithm": _ALGORITHM,
        "order": order,
        "files": {file: manifest[file].sha256 for file in sorted(manifest)},
        "sizes": {file: manifest[file].size for file in sorted(manifest)},
    }
    with atomic_write(directory / name) as output:
        json.dump(content, output, indent=2)


def read(directory: Path, name: str = NAME) -> Manifest | None:
    """Read a checkpoint's manifest, or a part of it.

    Returns:
        None where there is none, as in checkpoints that stock Megatron saved.

    Raises:
        DamagedError: It is there and cannot be read.
    """
    try:
        content = json.loads((directory / name).read_bytes())
        sizes = content.get("sizes", {})
        if content["algorithm"] != _ALGORITHM or not isinstance(sizes, dict):
            raise ValueError
        manifest = {
            file: Entry(sizes.get(file), sha256) for file, sha256 in content["files"].items()
        }
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedError(f"{name} is not a manifest") from error
    if not manifest or not all(map(_is_file_name, manifest)):
        raise DamagedError(f"{name} is not a manifest")
    return manifest


def _is_file_name(name: str) -> bool:
    """Whether a file beside the manifest can have this name; nothing elsewhere is opened."""
    try:
        return Path(name).name == name and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # of half a character
        return False


def order(directory: Path) -> int | None:
    """Read the place of a checkpoint among those beside it, in the order of saving.

    Returns:
        From 1; 0 where the manifest does not say; None where there is none that can be read.
    """
    try:
        content = json.loads((directory / NAME).read_bytes())
        place = content.get("order", 0) if content["files"] else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return place if isinstance(place, int) and place >= 0 else None


def next_order(root: Path) -> int:
    """Return the place in the order of saving of the checkpoint that is saved next."""
    return 1 + max((order(directory) or 0 for directory in root.glob("iter_*")), default=0)


def wrong_sizes(directory: Path, manifest: Manifest) -> list[str]:
    """Find files that are absent, or longer or shorter than they were; reads none of them."""
    found = []
    for name, expected in manifest.items():
        try:
            size = (directory / name).stat().st_size
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
        else:
            if expected.size not in (None, size):
                found.append(f"{name} has {size} bytes instead of {expected.size}")
    return found


def wrong_content(directory: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Find files, among those named, whose content has changed; reads them whole, in parallel."""

    def check(name: str) -> str | None:
        try:
            actual = digest(directory / name)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return None if actual.sha256 == manifest[name].sha256 else f"{name} has changed (sha256)"

    with ThreadPoolExecutor(_THREADS) as pool:
        return [damage for damage in pool.map(check, names) if damage is not None]


def share(manifest: Manifest, rank: int, ranks: int) -> list[str]:
    """Return the files that one of ``ranks`` ranks reads, so that all read about as much."""
    loads = [0] * ranks
    mine = []
    for name in sorted(manifest, key=lambda name: (-(manifest[name].size or 0), name)):
        reader = loads.index(min(loads))
        loads[reader] += manifest[name].size or 1
        if reader == rank:
            mine.append(name)
    return mine
