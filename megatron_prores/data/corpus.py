"""A small real corpus from what every machine with Python already has: its standard library.

Nothing is downloaded. Each text file of the running interpreter's standard library is a document.
The same interpreter on the same machine gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from megatron_prores.data.staging import staging_directory
from megatron_prores.errors import Parser, UserError
from megatron_prores.system.files import publish

_SUFFIXES = frozenset({".py", ".pyi", ".txt", ".rst", ".md"})
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_MEGABYTE = 1_000_000

Corpus = dict[str, str]
"""The texts by source: the path below the library's root, with forward slashes, in sorted order."""


def read_tree(root: Path, prefix: str = "") -> Corpus:
    """Read every text file under a folder that is UTF-8 and not empty.

    Args:
        root: The folder; installed packages below it are left out.
        prefix: Put before each path.
    """
    corpus: Corpus = {}
    for path in sorted(path for path in root.rglob("*") if path.suffix in _SUFFIXES):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS & set(relative.parts):
            continue
        source = prefix + relative.as_posix()
        try:
            text = path.read_bytes().decode()
            source.encode()
        except (UnicodeError, OSError):  # OSError: a dangling link, or no permission to read
            continue
        if text.strip():
            corpus[source] = text
    return corpus


def collect(
    min_bytes: float, standard_library: Path | None = None, site_packages: Sequence[Path] = ()
) -> Corpus:
    """Gather the texts of this machine's Python, each once.

    Args:
        min_bytes: Text that the corpus needs. Where the standard library holds less (some
            distributions package its tests apart), installed packages are taken too.
        standard_library: Its folder; by default that of the running interpreter.
        site_packages: Folders of installed packages; by default those of the running interpreter.

    Raises:
        UserError: All of it together is smaller than ``min_bytes``.
    """
    paths = sysconfig.get_paths()
    corpus = _without_repeats(read_tree(standard_library or Path(paths["stdlib"])))
    if size_of(corpus) < min_bytes:
        print(f"the standard library has only {_megabytes(corpus)}; adding installed packages")
        for folder in site_packages or sorted({Path(paths["purelib"]), Path(paths["platlib"])}):
            corpus |= read_tree(folder, prefix="site-packages/")
        corpus = _without_repeats(corpus)
    if size_of(corpus) < min_bytes:
        raise UserError(
            f"this Python has only {_megabytes(corpus)} of text, fewer than --min-megabytes "
            f"{min_bytes / _MEGABYTE:g}; lower it, or use a Python with its tests"
        )
    return corpus


def size_of(corpus: Corpus) -> int:
    """Return the size of the texts in bytes of UTF-8."""
    return sum(len(text.encode()) for text in corpus.values())


def cap(corpus: Corpus, max_bytes: float) -> Corpus:
    """Keep an even sample of at most ``max_bytes``; the first files would all be of one kind."""
    kept: Corpus = {}
    left = max_bytes
    for source in sorted(corpus, key=lambda source: _hash_fraction("sample:" + source)):
        left -= len(corpus[source].encode())
        if left < 0:
            break
        kept[source] = corpus[source]
    return {source: corpus[source] for source in corpus if source in kept}


def write_corpus(corpus: Corpus, output_dir: Path, fraction: float) -> None:
    """Write ``train.jsonl`` and ``valid.jsonl``, both or neither.

    Args:
        corpus: The texts.
        output_dir: Folder of the two files, made if missing.
        fraction: Share of files for validation; a file's path alone decides, on every machine.

    Raises:
        UserError: A split would be empty, or an existing file holds another corpus.
    """
    valid = {source for source in corpus if _hash_fraction(source) < fraction}
    splits = {"train.jsonl": corpus.keys() - valid, "valid.jsonl": valid}
    with staging_directory(output_dir / "corpus") as staging:
        for name, split in splits.items():
            documents = [{"text": corpus[each], "source": each} for each in corpus if each in split]
            if not documents:
                raise UserError(
                    f"--validation-fraction {fraction:g} of {len(corpus)} files leaves {name} "
                    "empty; choose another fraction"
                )
            lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in documents]
            (staging / name).write_bytes("".join(lines).encode())
            final = output_dir / name
            if final.exists() and final.read_bytes() != (staging / name).read_bytes():
                raise UserError(
                    f"{final} already exists with another content; move it away or choose another "
                    "--output-dir"
                )
        for name, split in splits.items():
            publish(staging / name, output_dir / name)
            print(f"{output_dir / name}: {len(split)} files")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command ``tools/build_corpus.py``.

    Raises:
        UserError: An argument or what was found is not usable.
    """
    parser = Parser(
        description="Build a JSONL corpus from the sources of this Python's standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    least, most = "stop when there is less text (10^6 B)", "keep an even sample of at most this"
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--validation-fraction", type=float, default=0.02, help="share of files")
    parser.add_argument("--min-megabytes", type=float, default=10.0, help=least)
    parser.add_argument("--max-megabytes", type=float, default=float("inf"), help=most)
    args = parser.parse_args(argv)
    if not 0 < args.validation_fraction < 1:
        raise UserError(
            f"--validation-fraction {args.validation_fraction:g} must lie between 0 and 1"
        )
    if args.max_megabytes < args.min_megabytes:
        raise UserError(
            f"--max-megabytes {args.max_megabytes:g} is below --min-megabytes "
            f"{args.min_megabytes:g}; change one of them"
        )
    corpus = cap(collect(args.min_megabytes * _MEGABYTE), args.max_megabytes * _MEGABYTE)
    print(f"{len(corpus)} files, {_megabytes(corpus)}")
    write_corpus(corpus, args.output_dir, args.validation_fraction)


def _without_repeats(corpus: Corpus) -> Corpus:
    first: dict[str, str] = {}
    for source, text in corpus.items():
        first.setdefault(text, source)
    return {source: text for text, source in first.items()}


def _hash_fraction(name: str) -> float:
    """Map a name to [0, 1), evenly and the same everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def _megabytes(corpus: Corpus) -> str:
    return f"{size_of(corpus) / _MEGABYTE:.1f} MB"
