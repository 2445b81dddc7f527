"""Whether an indexed dataset (``.bin`` and ``.idx``) is whole, and made with the run's tokenizer.

Megatron maps both files into memory and believes the index: what lies past the end of the tokens
ends a run in its middle, with a crash, or goes unnoticed where the first samples are whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prores.data.indexed import Index, read_index
from megatron_prores.errors import UserError

_SCANNED_BYTES = 256 * 2**20
"""Token ids read in all to compare them with the vocabulary: a fraction of a second. Larger data is
sampled, in evenly spaced blocks; a tokenizer of another size shows in any text of some length."""
_BLOCK_BYTES = 2**20

_REMAKE = "make it again with tools/preprocess_data.py, or copy it again"


def data_prefixes(args: Any) -> list[tuple[str, str]]:
    """List the datasets that the flags name, read as Megatron reads them.

    Args:
        args: Parsed, not yet validated by Megatron.

    Returns:
        Each as (flag, path without ending).

    Raises:
        UserError: A list of data paths cannot be read.
    """
    from megatron.core.datasets.utils import get_blend_from_list

    lists = {
        "--data-path": [args.data_path],
        "--train-data-path": [args.train_data_path],
        "--valid-data-path": [args.valid_data_path],
        "--test-data-path": [args.test_data_path],
        "--data-args-path": _read_list("--data-args-path", args.data_args_path, per_split=False),
        "--per-split-data-args-path": _read_list(
            "--per-split-data-args-path", args.per_split_data_args_path, per_split=True
        ),
    }
    prefixes: list[tuple[str, str]] = []
    for flag, blends in lists.items():
        for words in filter(None, blends):
            try:
                prefixes += [(flag, prefix) for prefix in get_blend_from_list(words)[0]]
            except AssertionError as error:
                raise UserError(
                    f"{flag} {' '.join(words)}: give paths alone, or a weight before every path"
                ) from error
    return prefixes


def _read_list(flag: str, path: str | None, per_split: bool) -> list[Any]:
    """Read a file of data paths: words, or JSON with a list of words for each split."""
    if not path:
        return []
    try:
        text = Path(path).read_text()
        if not per_split:
            return [text.split()]
        content = json.loads(text)
        blends = [content[split] for split in ("train", "valid", "test")]
    except OSError as error:
        raise UserError(f"{flag} {path}: {str(error.strerror).lower()}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{flag} {path}: must be {{"train": [...], "valid": [...], "test": [...]}} in JSON'
        ) from error
    return [blend.split() if isinstance(blend, str) else blend for blend in blends]


def check_dataset(flag: str, prefix: str) -> None:
    """Refuse a dataset whose index cannot be read, or tell of more tokens than there are.

    Args:
        flag: The flag that names the dataset.
        prefix: Its path without ``.bin`` and ``.idx``.

    Raises:
        UserError: Names the flag, the file, and what is wrong with it.
    """
    for ending in (".bin", ".idx"):
        if not os.path.isfile(prefix + ending):
            raise UserError(
                f"{flag} {prefix}: no file {prefix}{ending}; give the path that "
                "tools/preprocess_data.py printed, without .bin or .idx"
            )
    index = _read_index(flag, prefix)
    lengths, pointers = index.lengths, index.pointers
    damaged = f"{flag} {prefix}: {prefix}.idx is damaged"
    if len(lengths) == 0:
        raise UserError(f"{flag} {prefix}: there is no document in it; {_REMAKE}")
    documents = index.documents
    if not documents.size or documents[-1] != len(lengths) or documents[0] != 0:
        raise UserError(f"{damaged}: its documents do not add up; {_REMAKE}")
    if lengths.min() < 0 or pointers.min() < 0:
        raise UserError(f"{damaged}: it has negative sizes; {_REMAKE}")
    needed = int((pointers + lengths.astype(np.int64) * index.dtype.itemsize).max())
    size = os.path.getsize(f"{prefix}.bin")
    if size < needed:
        raise UserError(
            f"{flag} {prefix}: {prefix}.bin has {size} bytes, but by {prefix}.idx it needs "
            f"{needed}: it was cut short, or the two belong to different datasets; {_REMAKE}"
        )
    if size == 0:
        raise UserError(f"{flag} {prefix}: {prefix}.bin is empty; {_REMAKE}")


def check_token_ids(datasets: Iterable[tuple[str, str]], vocabulary: int, named: str) -> None:
    """Refuse token ids that the tokenizer has not: those of another tokenizer, or damage.

    Args:
        datasets: (flag, path without ending), each as :func:`check_dataset` has passed it.
        vocabulary: Number of token ids of the run's tokenizer.
        named: The tokenizer, for the message.

    Raises:
        UserError: Names the dataset, the id, and the flag of the tokenizer.
    """
    chosen = list(dict.fromkeys(datasets))
    for flag, prefix in chosen:
        dtype = _read_index(flag, prefix).dtype
        if dtype.kind not in "iu":
            raise UserError(f"{flag} {prefix}: {prefix}.idx says that token ids are {dtype}")
        tokens: np.ndarray = np.memmap(f"{prefix}.bin", mode="r", dtype=np.uint8)
        tokens = tokens[: tokens.size // dtype.itemsize * dtype.itemsize].view(dtype)
        for block in _sample(tokens, _SCANNED_BYTES // len(chosen)):
            low, high = int(block.min()), int(block.max())
            if low < 0 or high >= vocabulary:
                raise UserError(
                    f"{flag} {prefix}: it has the token id {low if low < 0 else high}, the "
                    f"tokenizer has {vocabulary} ids, from 0: the data was made with another "
                    f"tokenizer than {named}"
                )


def _sample(tokens: np.ndarray, most_bytes: int) -> Iterable[np.ndarray]:
    """Return the tokens in blocks: all, or evenly spaced ones, among them the first and last."""
    length = max(1, _BLOCK_BYTES // tokens.itemsize)
    count = -(-tokens.size // length)
    wanted = min(count, max(2, most_bytes // _BLOCK_BYTES))
    for block in np.unique(np.linspace(0, count - 1, wanted).round().astype(np.int64)):
        yield tokens[block * length : (block + 1) * length]


def _read_index(flag: str, prefix: str) -> Index:
    try:
        return read_index(f"{prefix}.idx")
    except ValueError as error:
        raise UserError(
            f"{flag} {prefix}: {prefix}.idx is not an index, or was cut short; {_REMAKE}"
        ) from error
    except OSError as error:
        raise UserError(f"{flag} {prefix}: {prefix}.idx: {error.strerror}") from error
