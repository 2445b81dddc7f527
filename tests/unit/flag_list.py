"""Reads docs/flags.md, and gives every flag of Megatron's parser a value that it takes."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

from megatron.training.arguments import add_megatron_arguments

from megatron_prores.command_line.arguments import add_prores_args
from megatron_prores.errors import Parser
from tests.distributed.launch import REPOSITORY

DOCUMENT = "docs/flags.md"
VERDICTS = ("run", "planned", "warned", "refused", "no effect")
_ROW = re.compile(r"\| (`-.*?`) \| ([a-z ]+) \| (.*) \|")


@dataclass(frozen=True)
class Listed:
    """What the document says of one flag."""

    flag: str
    verdict: str
    why: str


def read_document(text: str | None = None) -> list[Listed]:
    """Return all entries of the document, in its order."""
    lines = (text or (REPOSITORY / DOCUMENT).read_text()).splitlines()
    rows = [match for line in lines if (match := _ROW.fullmatch(line))]
    return [
        Listed(flag, row[2], row[3]) for row in rows for flag in re.findall(r"`(-[^`]+)`", row[1])
    ]


def make_parser() -> argparse.ArgumentParser:
    """Return Megatron's parser with the group ProRes; its errors are exceptions."""
    parser = add_megatron_arguments(Parser(add_help=False, allow_abbrev=False))
    return add_prores_args(parser)


def actions_by_flag(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return the parser's flags. Kitchen's are there where that library is, and not listed."""
    return {
        flag: action
        for action in parser._actions
        for flag in action.option_strings
        if not flag.startswith(("--kitchen-config", "--kitchen-recipe"))
    }


def complaints(listed: list[Listed], flags: set[str]) -> list[str]:
    """Say what the document lacks, or has too much of, beside the flags of a parser."""
    names = [entry.flag for entry in listed]
    return [
        *(
            f"{flag} is not in {DOCUMENT}: read what upstream does with it, refuse it or warn of "
            "it where nobody can vouch for it, and add a row"
            for flag in sorted(flags - set(names))
        ),
        *(
            f"{flag} is in {DOCUMENT}, but no flag of the parser any more: take it out"
            for flag in sorted(set(names) - flags)
        ),
        *(f"{name} is in {DOCUMENT} twice" for name in sorted(set(names)) if names.count(name) > 1),
        *(
            f"{entry.flag} has no such verdict: {entry.verdict}"
            for entry in listed
            if entry.verdict not in VERDICTS
        ),
    ]


# Where the next best value is none of the flag's own.
_VALUES = {
    "tuple_type": "4,0",
    "moe_freq_type": "2",
    "la_freq_type": "2",
    "no_rope_freq_type": "2",
    "_parse_cuda_graph_modules_arg": "attn",
    "bool": "1",
}


def words_of(flag: str, action: argparse.Action) -> list[str]:
    """Return a flag with a value that is not its default."""
    if action.nargs == 0:
        return [flag]
    count = action.nargs if isinstance(action.nargs, int) else 1
    return [flag, *[_value(action)] * count]


def _value(action: argparse.Action) -> str:
    if action.choices:
        choice: Any = next(each for each in action.choices if each != action.default)
        return str(getattr(choice, "name", choice))
    kind = getattr(action.type, "__name__", "str")
    if kind == "int":
        return str((action.default if isinstance(action.default, int) else 0) + 1)
    if kind == "float":
        return str((action.default or 0.0) + 0.25)
    return _VALUES.get(kind, "x")
