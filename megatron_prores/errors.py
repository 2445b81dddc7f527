"""How a run ends when it cannot go on: the reason in clear words, and a non-zero exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class StopRun(Exception):  # noqa: N818, it is no error of the program's
    """A reason to end the run that the user should read; no traceback helps with it.

    Anything else that is raised is a fault of ours or of the machine, and keeps its traceback.
    """

    exit_code = 1

    told_by_all_nodes = False
    """Whether each node says it. Else only rank 0 does: all ranks stop for the same reason."""

    def words(self) -> str:
        """Gives the message as it is shown."""
        return str(self)


class UserError(StopRun):
    """A wrong input, told in the user's words: which flag, which value, what to do. One line."""

    exit_code = 2  # as argparse's
    told_by_all_nodes = True  # a file may be missing on one node alone

    def words(self) -> str:
        """Gives the message on one line, whatever it was put together from."""
        return " ".join(str(self).split())


def print_error(message: str, told_by_all_nodes: bool = True) -> None:
    """Prints an error on standard error, once per node or once per job, not once per rank.

    Args:
        message: What is wrong and what to do.
        told_by_all_nodes: Whether the first rank of each node prints it, or only rank 0.
    """
    if int(os.environ.get("LOCAL_RANK" if told_by_all_nodes else "RANK", "0")) == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)


def run_program(main: Callable[[], int | None]) -> None:
    """Runs a command's ``main``; a :class:`StopRun` becomes its words and its exit code.

    Args:
        main: The program; returns its exit code, or None for 0.

    Raises:
        SystemExit: Always, with the program's exit code.
    """
    try:
        code = main() or 0
    except StopRun as reason:
        print_error(reason.words(), reason.told_by_all_nodes)
        code = reason.exit_code
    except KeyboardInterrupt:
        print_error("interrupted")
        code = 130
    sys.exit(code)
