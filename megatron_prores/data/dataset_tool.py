"""The command ``tools/dataset.py``: what is done with datasets that are finished."""

from __future__ import annotations

import argparse
import hashlib
import itertools
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prores.data.indexed import ENDINGS, DatasetWriter, with_suffix
from megatron_prores.data.sources import Source, find_sources
from megatron_prores.data.staging import refuse_existing, staging_directory
from megatron_prores.errors import Parser, UserError
from megatron_prores.runs.plot import check_picture, save_figure

_MADE_ALIKE = ("a tokenizer of sha256", "a vocabulary of", "end-of-document id")
"""Settings that datasets must share to be joined."""


def merge(sources: Sequence[Source], output: Path, most_tokens: int | None, overwrite: bool) -> int:
    """Join datasets into one, in little memory.

    Args:
        sources: In the order in which their documents will be.
        output: Path of the result, without ending.
        most_tokens: End with the document that reaches so many; None: take all.
        overwrite: Replace an existing result.

    Returns:
        Tokens of the result.

    Raises:
        UserError: They were made with different tokenizers, or have too few tokens.
    """
    for name in _MADE_ALIKE:
        values = {str(each.settings[name]) for each in sources if each.settings}
        if len(values) > 1:
            raise UserError(f"datasets made with {name} {' and '.join(sorted(values))} do not mix")
    types = {str(each.read_index().dtype) for each in sources}
    if len(types) > 1:
        raise UserError(f"datasets of {' and '.join(sorted(types))} ids: made with two tokenizers")
    tokens = 0
    with _writers([output], np.dtype(types.pop()), overwrite) as (writer,):
        for ids, lengths in _documents(sources):
            if most_tokens is not None and tokens + ids.size >= most_tokens:
                ends = np.cumsum(lengths)
                kept = int(np.searchsorted(ends, most_tokens - tokens)) + 1
                ids, lengths = ids[: ends[kept - 1]], lengths[:kept]
            writer.add(ids.tobytes(), lengths)
            tokens += ids.size
            if most_tokens is not None and tokens >= most_tokens:
                break
        else:
            if most_tokens is not None:
                raise UserError(f"--tokens {most_tokens}: there are only {tokens}")
    return tokens


def split(source: Source, output: Path, fraction: float, overwrite: bool) -> dict[str, int]:
    """Part a dataset by document into ``{output}_train`` and ``{output}_valid``.

    The token ids of a document alone decide where it goes: the same in every run and order, and
    copies of a document never lie on both sides.

    Returns:
        Tokens of both.

    Raises:
        UserError: One of them would be empty.
    """
    names = ("train", "valid")
    paths = [output.with_name(f"{output.name}_{name}") for name in names]
    counts = dict.fromkeys(names, 0)
    with _writers(paths, source.read_index().dtype, overwrite) as writers:
        for ids, lengths in source.documents():
            held_out = np.array([hashed < fraction * 2**64 for hashed in _hashes(ids, lengths)])
            of_token = np.repeat(held_out, lengths)
            for name, writer, wanted in zip(names, writers, (False, True), strict=True):
                chosen = ids[of_token == wanted]
                writer.add(chosen.tobytes(), lengths[held_out == wanted])
                counts[name] += chosen.size
        for name, count in counts.items():
            if not count:
                raise UserError(f"--fraction {fraction:g} leaves {name} empty; choose another")
    return counts


def verify(source: Source, vocab_size: int | None = None, eod: int | None = None) -> int:
    """Check all of a dataset; of a shard also against its marker.

    Args:
        source: The dataset.
        vocab_size: Ids that its tokenizer has; None: what the marker tells.
        eod: The last id of every document; None: what the marker tells.

    Returns:
        Its tokens.

    Raises:
        UserError: What is wrong with it.
    """
    where = f"dataset {source.prefix}"
    settings = source.settings or {}
    vocab_size = vocab_size or settings.get("a vocabulary of")
    eod = settings.get("end-of-document id") if eod is None else eod
    tokens, first = 0, 0
    digest = hashlib.sha256()
    for ids, lengths in source.documents():
        digest.update(ids)
        if vocab_size is not None and ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise UserError(f"{where}: token id {wrong} is outside the vocabulary of {vocab_size}")
        last = np.cumsum(lengths) - 1
        if not lengths.all():
            raise UserError(f"{where}: document {first + int(lengths.argmin())} is empty")
        if eod is not None and (ids[last] != eod).any():
            number = first + int((ids[last] != eod).argmax())
            raise UserError(f"{where}: document {number} does not end with the id {eod}")
        tokens, first = tokens + ids.size, first + len(lengths)
    if source.part is not None:
        found = {".bin": digest.hexdigest(), ".idx": sha256(Path(f"{source.prefix}.idx"))}
        for ending, expected in source.part.digests[source.key].items():
            if found[ending] != expected:
                raise UserError(
                    f"{source.prefix}{ending} is not what was written: its sha256 is not the one "
                    f"in {source.part.name}.json"
                )
    return tokens


def stats(sources: Sequence[Source], picture: Path | None = None) -> str:
    """Count documents, tokens and copies; return a report.

    Args:
        sources: The datasets.
        picture: A .png for the histogram of lengths, or None.
    """
    found = [np.empty(0, np.int32)]
    hashes = array("Q")  # 8 bytes a document: a billion of them fit into memory.
    for ids, lengths in _documents(sources):
        found.append(lengths)
        hashes.extend(_hashes(ids, lengths))
    lengths = np.concatenate(found)
    tokens = int(lengths.sum(dtype=np.int64))
    copies = len(hashes) - len(np.unique(np.frombuffer(hashes, np.uint64)))
    low, middle, high = np.percentile(lengths, (5, 50, 95))
    lines = [
        f"{len(lengths)} documents, {tokens} tokens",
        f"tokens of a document: {tokens / len(lengths):.1f} on average, {lengths.min()} to "
        f"{lengths.max()}; median {middle:.0f}, 5 % below {low:.0f}, 5 % above {high:.0f}",
        f"{copies} documents are copies of others ({100 * copies / len(lengths):.2f} %)",
    ]
    parts = [each.part for each in sources if each.part is not None]
    # Markers count the text of all keys together.
    if len(parts) == len(sources) and all(len(part.tokens) == 1 for part in parts):
        text = sum(part.text_bytes for part in parts)
        lines.append(f"{text} bytes of text: {tokens / text:.4f} tokens per byte")
    if picture is not None:
        _draw(lengths, picture)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command ``tools/dataset.py``.

    Args:
        argv: Arguments; those of the process by default.

    Raises:
        UserError: A dataset is missing, damaged or does not fit.
    """
    args = _parser().parse_args(argv)
    match args.command:
        case "merge":
            if args.tokens is not None and args.tokens < 1:
                raise UserError(f"--tokens {args.tokens} must be at least 1")
            sources = find_sources(args.datasets, args.key, partial=args.tokens is not None)
            if len({each.key for each in sources if each.part is not None}) > 1:
                raise UserError("the shards have several keys: choose one with --key")
            tokens = merge(sources, args.output, args.tokens, args.overwrite)
            print(f"{args.output}: {tokens} tokens of {len(sources)} datasets")
        case "verify":
            sources = find_sources(args.datasets, args.key)
            tokens = sum(verify(each, args.vocab_size, args.eod) for each in sources)
            print(f"{len(sources)} datasets, {tokens} tokens: whole")
        case "stats":
            if args.picture is not None:
                check_picture(args.picture, "--picture")
            print(stats(find_sources(args.datasets, args.key), args.picture))
        case "split":
            if not 0 < args.fraction < 1:
                raise UserError(f"--fraction {args.fraction:g} must lie between 0 and 1")
            counts = split(Source(args.dataset), args.output, args.fraction, args.overwrite)
            for name, count in counts.items():
                print(f"{args.output}_{name}: {count} tokens")


def sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _writers(
    paths: Sequence[Path], dtype: np.dtype[Any], overwrite: bool
) -> Iterator[list[DatasetWriter]]:
    """Write datasets that appear together at the end, or not at all."""
    refuse_existing([with_suffix(path, end) for path in paths for end in ENDINGS], overwrite)
    with staging_directory(paths[0]) as folder:
        writers = [DatasetWriter(folder, path, dtype.type) for path in paths]
        try:
            yield writers
            for writer in writers:
                writer.finish()
            for writer in writers:
                writer.publish()
        except OSError as error:
            raise UserError(f"--output {paths[0]}: cannot write: {error.strerror}") from error


def _documents(sources: Sequence[Source]) -> Iterator[Any]:
    return itertools.chain.from_iterable(each.documents() for each in sources)


def _hashes(ids: Any, lengths: Any) -> Iterator[int]:
    """Return a digest of the token ids of each document, 64 bits."""
    content = memoryview(ids.astype("<i8")).cast("B")  # The same for ids of two and four bytes.
    end = 0
    for length in lengths.tolist():
        start, end = end, end + 8 * length
        yield int.from_bytes(hashlib.blake2b(content[start:end], digest_size=8).digest())


def _draw(lengths: Any, picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths, np.geomspace(max(1, lengths.min()), lengths.max() + 1, 60).tolist())
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="documents")
    save_figure(figure, picture, "--picture")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description="Join, check, count and split indexed datasets.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text)
        if name == "split":
            found.add_argument("dataset", help="path without .bin and .idx")
        else:
            found.add_argument(
                "datasets", nargs="+", metavar="DATASET",
                help="path without .bin and .idx, or a directory of preprocess_data.py",
            )  # fmt: skip
            found.add_argument("--key", help="of shards with several: which (default: all)")
        if name in ("merge", "split"):
            found.add_argument("--output", type=Path, required=True, metavar="PATH",
                               help="path of the result without .bin and .idx")  # fmt: skip
            found.add_argument("--overwrite", action="store_true", help="replace the result")
        return found

    joined = command("merge", "Join datasets into one, in the order given.")
    joined.add_argument("--tokens", type=int, help="end with the document that reaches so many")
    checked = command("verify", "Check ids, document ends, lengths and digests.")
    checked.add_argument("--vocab-size", type=int, help="of the tokenizer (shards know it)")
    checked.add_argument("--eod", type=int, help="last id of every document (shards know it)")
    counted = command("stats", "Count documents, tokens, lengths and copies.")
    counted.add_argument("--picture", type=Path, help="a .png of the lengths")
    parted = command("split", "Part a dataset by document into PATH_train and PATH_valid.")
    parted.add_argument("--fraction", type=float, required=True, help="of documents for PATH_valid")
    return parser
