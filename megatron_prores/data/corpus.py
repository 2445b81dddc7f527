"""A small real corpus from what every machine with Python already has: its standard library.

Nothing is downloaded: the sources and texts of the running interpreter's standard library, one
document per file. The same interpreter on the same machine gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from megatron_prores.data.staging import staging_directory
from megatron_prores.errors import Parser, UserError
from megatron_prores.files import publish

TRAIN_NAME = "train.jsonl"
VALID_NAME = "valid.jsonl"

_TEXT_SUFFIXES = frozenset({".py", ".pyi", ".txt", ".rst", ".md"})
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class SourceFile:
    """A text of the corpus."""

    source: str
    """Path relative to the library's root, with forward slashes; orders and splits the corpus."""
    text: str
    size: int
    """Bytes in UTF-8."""


@dataclass
class Collection:
    """What a walk over libraries found."""

    files: list[SourceFile] = field(default_factory=list)
    duplicates: int = 0
    undecodable: int = 0
    _seen: set[bytes] = field(default_factory=set)

    @property
    def size(self) -> int:
        """Bytes of text."""
        return sum(file.size for file in self.files)

    def add_tree(self, root: Path, prefix: str = "") -> None:
        """Add every text file under a folder, in the order of the paths.

        Empty files and repeats of a text already held are left out, and files that are not UTF-8.

        Args:
            root: Top folder.
            prefix: Put before the relative path in :attr:`SourceFile.source`.
        """
        for path in sorted(_text_files(root)):
            source = prefix + path.relative_to(root).as_posix()
            try:
                content = path.read_bytes()
                text = content.decode("utf-8")
                source.encode("utf-8")
            except UnicodeError:
                self.undecodable += 1
                continue
            except OSError:  # A dangling link or a file without read permission.
                continue
            digest = hashlib.sha256(content).digest()
            if not text.strip():
                continue
            if digest in self._seen:
                self.duplicates += 1
                continue
            self._seen.add(digest)
            self.files.append(SourceFile(source, text, len(content)))


def collect(
    min_bytes: int, standard_library: Path | None = None, site_packages: Sequence[Path] = ()
) -> Collection:
    """Gather the texts of this machine's Python.

    Args:
        min_bytes: Text that the corpus needs. Where the standard library holds less (some
            distributions package its tests apart), installed packages are taken too.
        standard_library: Its folder; by default that of the running interpreter.
        site_packages: Folders of installed packages; by default those of the running interpreter.

    Returns:
        The files and what was left out.

    Raises:
        UserError: All of it together is smaller than ``min_bytes``.
    """
    paths = sysconfig.get_paths()
    collection = Collection()
    collection.add_tree(standard_library or Path(paths["stdlib"]))
    if collection.size < min_bytes:
        print(
            f"the standard library here has only {_megabytes(collection.size)} MB of text; "
            "adding the sources of installed packages"
        )
        folders = site_packages or sorted({Path(paths["purelib"]), Path(paths["platlib"])})
        for folder in folders:
            collection.add_tree(folder, prefix="site-packages/")
    if collection.size < min_bytes:
        raise UserError(
            f"this Python has only {_megabytes(collection.size)} MB of text, fewer than "
            f"--min-megabytes {min_bytes / _MEGABYTE:g}; lower it, or use a Python with its tests"
        )
    return collection


def cap(files: Sequence[SourceFile], max_bytes: int) -> list[SourceFile]:
    """Keep a fair sample of at most ``max_bytes``: a first part of the alphabet would be one kind.

    Args:
        files: The files in their order.
        max_bytes: Most bytes to keep.

    Returns:
        The kept files, in the same order.
    """
    kept: set[str] = set()
    total = 0
    for file in sorted(files, key=lambda file: _hash_fraction("sample:" + file.source)):
        total += file.size
        if total > max_bytes:
            break
        kept.add(file.source)
    return [file for file in files if file.source in kept]


def is_validation(source: str, fraction: float) -> bool:
    """Whether a file belongs to the validation set: its path alone decides, on every machine.

    Args:
        source: The file's relative path.
        fraction: Expected share of files in the validation set, 0 to 1.
    """
    return _hash_fraction(source) < fraction


def write_corpus(files: Sequence[SourceFile], output_dir: Path, fraction: float) -> None:
    """Write ``train.jsonl`` and ``valid.jsonl`` and print what they hold.

    Both get their names only when both are complete. Files already there with the same bytes are
    left alone.

    Args:
        files: The corpus.
        output_dir: Folder of the two files, made if missing.
        fraction: Share of files for validation.

    Raises:
        UserError: A split would be empty, or an existing file there holds something else.
    """
    splits = {
        TRAIN_NAME: [file for file in files if not is_validation(file.source, fraction)],
        VALID_NAME: [file for file in files if is_validation(file.source, fraction)],
    }
    for name, split in splits.items():
        if not split:
            raise UserError(
                f"--validation-fraction {fraction:g} of {len(files)} files leaves {name} empty; "
                "choose another fraction"
            )
    with staging_directory(output_dir / "corpus") as staging:
        digests = {name: _write_split(split, staging / name) for name, split in splits.items()}
        for name, digest in digests.items():
            final = output_dir / name
            if final.exists() and _sha256(final) != digest:
                raise UserError(
                    f"{final} already exists with another content; "
                    "move it away or choose another --output-dir"
                )
        for name in splits:
            publish(staging / name, output_dir / name)
    for name, split in splits.items():
        size = _megabytes(sum(file.size for file in split))
        print(f"{output_dir / name}: {len(split)} files, {size} MB, sha256 {digests[name]}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``tools/build_corpus.py``.

    Args:
        argv: Arguments; those of the process by default.

    Raises:
        UserError: An argument or what was found is not usable.
    """
    parser = Parser(
        description="Build a JSONL corpus from the sources of this Python's standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the two files")
    parser.add_argument(
        "--validation-fraction", type=float, default=0.02, help="share of files for validation"
    )
    parser.add_argument(
        "--min-megabytes", type=float, default=10.0, help="stop when there is less text (10^6 B)"
    )
    parser.add_argument(
        "--max-megabytes", type=float, help="keep a fixed sample of at most this size (10^6 B)"
    )
    args = parser.parse_args(argv)
    if not 0 < args.validation_fraction < 1:
        raise UserError(
            f"--validation-fraction {args.validation_fraction:g} must lie between 0 and 1"
        )
    if args.max_megabytes is not None and args.max_megabytes < args.min_megabytes:
        raise UserError(
            f"--max-megabytes {args.max_megabytes:g} is below "
            f"--min-megabytes {args.min_megabytes:g}; change one of them"
        )
    collection = collect(round(args.min_megabytes * _MEGABYTE))
    files = collection.files
    if args.max_megabytes is not None:
        files = cap(files, round(args.max_megabytes * _MEGABYTE))
    print(
        f"found {len(collection.files)} files, {_megabytes(collection.size)} MB; left out "
        f"{collection.duplicates} duplicates and {collection.undecodable} not in UTF-8"
    )
    write_corpus(files, args.output_dir, args.validation_fraction)


def _text_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in root.walk():
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        yield from (folder / name for name in names if Path(name).suffix in _TEXT_SUFFIXES)


def _write_split(files: Sequence[SourceFile], path: Path) -> str:
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for file in files:
            _write_document(stream, file)
    return _sha256(path)


def _write_document(stream: TextIO, file: SourceFile) -> None:
    document = {"text": file.text, "source": file.source}
    stream.write(json.dumps(document, ensure_ascii=False) + "\n")


def _hash_fraction(name: str) -> float:
    """Map a name to [0, 1), evenly and the same everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _megabytes(size: int) -> str:
    return f"{size / _MEGABYTE:.1f}"
