"""Whether a checkpoint is intact: every file there, unchanged and readable, every tensor finite."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_prores.checkpoint import manifest
from megatron_prores.checkpoint.manifest import DamagedError
from megatron_prores.checkpoint.reader import (
    FORMAT,
    INDEX,
    StoredCheckpoint,
    is_distributed,
    iterations,
)

_SMALL = (INDEX, FORMAT)
"""Files that a run reads before it can verify the whole on all ranks together."""


@dataclass
class Report:
    """What the verification of one checkpoint has found."""

    damage: list[str] = field(default_factory=list)
    """What is wrong, each naming its file; empty for an intact checkpoint."""
    files: int = 0
    size: int = 0
    """Bytes of all its files."""
    tensors: int = 0
    """Whole tensors that were read, found as the index says they are, and finite."""
    by_manifest: bool = False
    """Whether every file was compared with the sha256 that was taken when it was saved."""

    @property
    def intact(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damage


def surface_damage(directory: Path) -> list[str]:
    """Find what is wrong as far as that is seen without reading the large files.

    Args:
        directory: Of one iteration.

    Returns:
        What is wrong: files that are missing or of another size, an unreadable index.
    """
    if not directory.is_dir():
        return ["its directory is missing"]
    try:
        expected = manifest.read(directory)
        if expected is not None:
            small = [name for name in _SMALL if name in expected]
            if damage := manifest.wrong_sizes(directory, expected) or manifest.wrong_content(
                directory, expected, small
            ):
                return damage
        if not is_distributed(directory):
            return []
        stored = StoredCheckpoint(directory)
        stored.check_format()
        return stored.check_extents()
    except DamagedError as error:
        return [str(error)]


def content_damage(directory: Path) -> list[str]:
    """Find what is wrong in a checkpoint's files, by its manifest where it has one.

    Args:
        directory: Of one iteration.
    """
    if damage := surface_damage(directory):
        return damage
    expected = manifest.read(directory)
    if expected is not None:
        return manifest.wrong_content(directory, expected, expected)
    return _read_all(directory, Report(), finite=False)


def newest_intact(root: Path, besides: Path | None = None) -> int | None:
    """Find the newest intact checkpoint below a directory; reads it, and the damaged ones, whole.

    Args:
        root: What ``--load`` names.
        besides: The checkpoint that is known to be damaged.
    """
    for iteration, directory in reversed(iterations(root).items()):
        if directory != besides and not content_damage(directory):
            return iteration
    return None


def verify(directory: Path) -> Report:
    """Verify one checkpoint as far as possible, all of it.

    Args:
        directory: Of one iteration.
    """
    report = Report(damage=surface_damage(directory))
    if directory.is_dir():
        sizes = [entry.stat().st_size for entry in directory.rglob("*") if entry.is_file()]
        report.files, report.size = len(sizes), sum(sizes)
    if report.damage:
        return report
    expected = manifest.read(directory)
    if expected is not None:
        report.by_manifest = True
        report.damage = manifest.wrong_content(directory, expected, expected)
    if not report.damage:
        # Also where the sha256 agree: a tensor that was not finite was saved like that.
        report.damage = _read_all(directory, report, finite=True)
    return report


def _read_all(directory: Path, report: Report, finite: bool) -> list[str]:
    if not is_distributed(directory):
        return _read_old_format(directory)
    stored = StoredCheckpoint(directory)
    damage: list[str] = []
    try:
        for key in stored.objects:
            stored.object(key, check_crc=not report.by_manifest)
        _ = stored.common if stored.has_common else None
    except DamagedError as error:
        damage.append(str(error))
    for name in stored.tensors:
        try:
            _read_tensor(stored, name, check_crc=not report.by_manifest, finite=finite)
            report.tensors += 1
        except DamagedError as error:
            damage.append(str(error))
    return damage


def _read_tensor(stored: StoredCheckpoint, name: str, check_crc: bool, finite: bool) -> None:
    covered = 0
    for key, chunk in stored.chunks(name):
        tensor = stored.chunk(key, chunk.sizes, check_crc)
        covered += tensor.numel()
        # The 8-bit floats have no isfinite of their own.
        wide = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        if finite and not bool(torch.isfinite(wide).all()):
            count = int((~torch.isfinite(wide)).sum())
            raise DamagedError(
                f"{stored.index.storage_data[key].relative_path}: {name} has {count} values that "
                "are not finite"
            )
    if covered != stored.tensors[name].size.numel():
        raise DamagedError(
            f"{INDEX} has only {covered} of the {stored.tensors[name].size.numel()} values of "
            f"{name}"
        )


def _read_old_format(directory: Path) -> list[str]:
    """Compare the checksums within the files of Megatron's old format, a file per rank."""
    damage = []
    for path in sorted(directory.rglob("*.pt")):
        name = path.relative_to(directory)
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    damage.append(f"{name} has changed (CRC-32)")
        except (OSError, zipfile.BadZipFile) as error:
            damage.append(f"{name} is unreadable: {error}")
    return damage
