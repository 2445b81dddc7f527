"""Finished datasets, as the commands of ``tools/dataset.py`` are given them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_prores.data.dataset_files import check_dataset
from megatron_prores.data.indexed import Index, read_documents, read_index
from megatron_prores.data.shards import Part, Shards
from megatron_prores.errors import UserError


@dataclass(frozen=True)
class Source:
    """One dataset."""

    prefix: str
    """Its path without ``.bin`` and ``.idx``."""
    key: str = ""
    """Of a shard: the field that its text was under."""
    part: Part | None = None
    """Of a shard: its marker."""
    settings: dict[str, Any] | None = None
    """Of a shard: what it was made with."""

    def read_index(self) -> Index:
        """Read the index.

        Raises:
            UserError: The files are missing or damaged, or not one sequence a document.
        """
        check_dataset("dataset", self.prefix)
        index = read_index(f"{self.prefix}.idx")
        if not index.is_packed:
            raise UserError(
                f"dataset {self.prefix}: its documents have several sequences, or gaps between "
                "them: preprocess_data.py did not make it"
            )
        return index

    def documents(self) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int32]]]:
        """Read the documents, some at a time; see :func:`indexed.read_documents`."""
        return read_documents(self.prefix, self.read_index())


def find_sources(names: Sequence[str], key: str | None, partial: bool = False) -> list[Source]:
    """List the datasets that the user named.

    Args:
        names: Paths of datasets without ending, or directories of shards, which stand for all
            their datasets in the order of their inputs.
        key: Which of the datasets of each shard; None: all.
        partial: Take the beginning of a directory that is not complete.

    Raises:
        UserError: A directory is not complete, has no such key, or holds no dataset.
    """
    found = []
    for name in names:
        if not Path(name).is_dir():
            found.append(Source(name))
            continue
        shards = Shards.read(Path(name))
        missing = sum(not shards.is_finished(number) for number in range(len(shards.inputs)))
        if missing and not partial:
            raise UserError(
                f"{name}: {missing} of {len(shards.inputs)} inputs are missing; start "
                "preprocess_data.py again with the same flags"
            )
        keys = shards.settings["--json-keys"]
        if key is not None and key not in keys:
            raise UserError(f"--key {key}: the shards of {name} have {', '.join(keys)}")
        # A part without tokens has no dataset: Megatron cannot map an empty file.
        shard = [
            Source(str(shards.path(part, each)), each, part, shards.settings)
            for part in shards.finished()
            for each in keys
            if key in (None, each) and part.tokens.get(each)
        ]
        if not shard:
            raise UserError(f"{name}: its shards have no token")
        found += shard
    return found
