"""A directory of shards: many inputs to as many datasets, by many processes, none of them twice.

``shards.json`` names the settings and the inputs in their order. Input n becomes the datasets
``n-part``; each appears under its name when it is whole, and last its marker ``n-part.json``, which
tells what it was made from. A run makes what has no marker yet.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_prores.data.inputs import Input
from megatron_prores.data.output import Summary, dataset_path
from megatron_prores.data.staging import staging_directory
from megatron_prores.errors import UserError
from megatron_prores.system.files import atomic_write

PLAN = "shards.json"


def input_name(number: int) -> str:
    """Return how the files of an input's shards begin."""
    return f"{number:05d}"


def part_name(number: int, part: int) -> str:
    """Return the name of a shard."""
    return f"{input_name(number)}-{part:04d}"


@dataclass(frozen=True)
class Part:
    """One finished shard."""

    name: str
    """Of its files, without ``_{key}_document``."""
    input: list[Any]
    """Name and size of what it was made from."""
    settings: str
    """sha256 of the settings that it was made with."""
    first_line: int
    next_line: int
    """The line of the input at which the next part begins."""
    last: bool
    """Whether the input ends with it."""
    documents: int
    text_bytes: int
    tokens: dict[str, int]
    """By key."""
    left_out: dict[str, int]
    digests: dict[str, dict[str, str]]
    """sha256 by key and ending."""


@dataclass(frozen=True)
class Shards:
    """A directory of shards, as it is on the disk.

    Args:
        directory: The directory.
        settings: What decides the token ids, as plain data.
        inputs: Names and sizes of the inputs, in order.
    """

    directory: Path
    settings: dict[str, Any]
    inputs: list[list[Any]]

    @staticmethod
    def read(directory: Path) -> Shards:
        """Read the plan of a directory.

        Raises:
            UserError: There is none.
        """
        try:
            content = json.loads((directory / PLAN).read_text())
            return Shards(directory, content["settings"], content["inputs"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{directory}: no readable {PLAN}: give a directory that preprocess_data.py "
                "--output-dir has made"
            ) from error

    def parts(self, number: int) -> list[Part]:
        """List the finished parts of an input, without a gap, from its first."""
        found: list[Part] = []
        while not (found and found[-1].last):
            name = part_name(number, len(found))
            try:
                part = Part(**json.loads((self.directory / f"{name}.json").read_text()))
            except FileNotFoundError:
                break
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"{self.directory / name}.json: not a marker of a shard") from error
            if part.settings != self.digest or part.input != self.inputs[number]:
                raise UserError(
                    f"{self.directory / name}.json: this shard was made of another input "
                    f"({part.input[0]}) or with other settings than {PLAN} tells; take it away"
                )
            found.append(part)
        return found

    def is_finished(self, number: int) -> bool:
        """Return whether an input is done."""
        parts = self.parts(number)
        return bool(parts) and parts[-1].last

    def finished(self) -> Iterator[Part]:
        """List the parts of the first inputs, in order, up to one that is missing."""
        for number in range(len(self.inputs)):
            parts = self.parts(number)
            yield from parts
            if not (parts and parts[-1].last):
                return

    @cached_property
    def digest(self) -> str:
        """Return the sha256 of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def contents(self) -> str:
        """Return how much there is, and what was left out, in words."""
        parts = [self.parts(number) for number in range(len(self.inputs))]
        whole = sum(bool(each) and each[-1].last for each in parts)
        total = Summary()
        for part in itertools.chain(*parts):
            total.documents += part.documents
            total.tokens += Counter(part.tokens)
            total.left_out += Counter(part.left_out)
        return (
            f"{whole} of {len(parts)} inputs, {total.documents} documents, "
            f"{total.tokens.total()} tokens; {total.what_was_left_out()}"
        )

    def path(self, part: Part, key: str) -> Path:
        """Return the path of a part's dataset, without ending."""
        return dataset_path(self.directory / part.name, key)


def open_shards(directory: Path, settings: dict[str, Any], inputs: Sequence[Input]) -> Shards:
    """Make a directory of shards, or go on with it.

    Args:
        directory: The directory, made if missing.
        settings: What decides the token ids.
        inputs: All inputs; those of before first, more may follow.

    Raises:
        UserError: It holds shards of other settings or inputs, or cannot be written.
    """
    wanted = Shards(directory, settings, [[each.name, each.size] for each in inputs])
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Machines that start at once do this one after the other.
        with staging_directory(directory / PLAN, wait=True):
            if (directory / PLAN).exists():
                _check_same(Shards.read(directory), wanted)
            with atomic_write(directory / PLAN) as file:
                json.dump({"settings": settings, "inputs": wanted.inputs}, file, indent=1)
    except OSError as error:
        raise UserError(f"--output-dir {directory}: cannot write: {error.strerror}") from error
    return wanted


def _check_same(found: Shards, wanted: Shards) -> None:
    """Refuse to mix shards of different making."""
    where = f"--output-dir {found.directory}: its shards were made"
    for name, value in wanted.settings.items():
        if found.settings.get(name) != value:
            raise UserError(
                f"{where} with {name} {found.settings.get(name)}, not {value}; choose another "
                "directory"
            )
    for before, now in zip(found.inputs, wanted.inputs, strict=False):
        if before != now:
            raise UserError(
                f"{where} from {before[0]} ({before[1]} bytes), where {now[0]} ({now[1]} bytes) is "
                "now; give the inputs of before first, or choose another directory"
            )
    if len(wanted.inputs) < len(found.inputs):
        raise UserError(
            f"{where} from {len(found.inputs)} inputs, not {len(wanted.inputs)}; give all of them"
        )
