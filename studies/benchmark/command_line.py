"""What the command lines of both suites share: the fields of a model's size."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields

from megatron_prores.command_line.values import flag_of
from megatron_prores.errors import UserError
from studies.benchmark.model import Size


def add_size_flags(parser: argparse.ArgumentParser, words: str) -> None:
    """Add a flag for every field of a size.

    Args:
        parser: The suite's.
        words: Of the help.
    """
    for field in fields(Size):
        parser.add_argument(flag_of(field.name), type=int, metavar="N", help=words)


def given_size(args: argparse.Namespace) -> dict[str, int]:
    """Return those fields of a size that the command line has."""
    given = {field.name: getattr(args, field.name) for field in fields(Size)}
    return {name: value for name, value in given.items() if value is not None}


def check_counts(counts: Mapping[str, int | None]) -> None:
    """Refuse whole numbers below 1.

    Args:
        counts: By their names in the command line's namespace; None: not given.

    Raises:
        UserError: Names the flag.
    """
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{flag_of(name)} {value}: must be at least 1")
