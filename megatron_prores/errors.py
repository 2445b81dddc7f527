"""How a run ends when it cannot go on: the reason in clear words, and a non-zero exit code."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

_QUIET_RANK_WAIT_SECONDS = 5.0
"""Seconds that a silent rank waits with its end for the rank that prints the reason."""


EXIT_INTERRUPTED = 75
"""The run was asked to end by a signal, and has saved: start it again, it goes on. (EX_TEMPFAIL of
sysexits.h. Python, torchrun and Megatron use 1, 2, 16, 17, and 128 + a signal's number.)"""


TRACEBACK = "PRORES_TRACEBACK"
"""Environment variable; 1: a run that stops with a line prints first where that came from."""


class StopRun(Exception):  # noqa: N818, it is no error of the program's
    """A reason to end the run that the user should read; no traceback helps with it.

    Anything else that is raised is a fault of ours or of the machine, and keeps its traceback.
    """

    exit_code = 1

    print_on_each_node = False
    """Whether each node says it. Else only rank 0 does: all ranks stop for the same reason."""

    def message(self) -> str:
        """Return the message as it is shown."""
        return str(self)


class UserError(StopRun):
    """A wrong input, told in the user's words: which flag, which value, what to do. One line."""

    exit_code = 2  # as argparse's
    print_on_each_node = True  # a file may be missing on one node alone

    def message(self) -> str:
        """Return the message on one line, whatever it was put together from."""
        return " ".join(str(self).split())


@dataclass(frozen=True)
class Argument:
    """An argument where a message mentions it: ``name=value``, or its name alone."""

    name: str
    value: Any = None
    """None: its name alone."""

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value!r}"


class ArgumentError(ValueError):
    """An argument has a value that cannot be used: ``warmup_iters=0: must be at least 1``.

    It is raised with the parts of its message, of which the command line shows the arguments as
    the flags that they come from.
    """

    def __init__(self, *parts: str | Argument) -> None:
        super().__init__(*parts)

    def __str__(self) -> str:
        return self.message()

    def message(self, show: Callable[[Argument], str] = str) -> str:
        """Return the message, with its arguments as ``show`` writes them."""
        return "".join(show(each) if isinstance(each, Argument) else each for each in self.args)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others; the usage alone fills up to a screen."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found as a :class:`UserError`."""
        raise UserError(f"{message} (--help explains the flags)")


def split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part a tool's own words from the flags of another program, which stand behind ``--``.

    Args:
        argv: Without the program's name.

    Returns:
        What stands before the first ``--``, and what stands behind it.
    """
    at = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def print_error(message: str, print_on_each_node: bool = True) -> None:
    """Print an error on standard error, once per node or once per job, not once per rank.

    Args:
        message: What is wrong and what to do.
        print_on_each_node: Whether the first rank of each node prints it, or only rank 0.
    """
    if _number("LOCAL_RANK" if print_on_each_node else "RANK") == 0:
        print_own_error(message)


def print_own_error(message: str) -> None:
    """Print an error that this process alone knows, whichever rank it is."""
    print(f"error: {message}", file=sys.stderr, flush=True)


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isascii() and text.isdigit() else 0  # wrong: that may be the error


def run_program(main: Callable[[], int | None]) -> None:
    """Run a command's ``main``; a :class:`StopRun` becomes its message and its exit code.

    Args:
        main: The program; returns its exit code, or None for 0.

    Raises:
        SystemExit: Always, with the program's exit code.
    """
    try:
        code = main() or 0
    except StopRun as reason:
        if os.environ.get(TRACEBACK) == "1":
            traceback.print_exception(reason)
        print_error(reason.message(), reason.print_on_each_node)
        code = reason.exit_code
        if "TORCHELASTIC_RUN_ID" in os.environ and _number("LOCAL_RANK") != 0:
            # torchrun ends all ranks with the first that ends; the one that says why should not be
            # among the former.
            time.sleep(_QUIET_RANK_WAIT_SECONDS)
    except KeyboardInterrupt:
        print_error("interrupted")
        code = 130
    sys.exit(code)
