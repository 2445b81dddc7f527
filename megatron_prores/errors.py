"""One way to tell a user that an input is wrong: one clear line and a non-zero exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

USAGE_EXIT_CODE = 2
"""Exit code of a run that a wrong input ended (argparse uses the same)."""


class UserError(Exception):
    """A wrong input, told in the user's words: which flag, which value, what to do.

    Programs show its message as one line and no traceback; anything else that is raised is a fault
    of ours or of the machine, and keeps its traceback.
    """


def print_error(message: str) -> None:
    """Prints one error line on standard error.

    Every rank of a job stops on the same wrong input; only the first says why, or a thousand ranks
    would print the line a thousand times.

    Args:
        message: What is wrong and what to do. Line breaks are folded: the promise is one line.
    """
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def run_program(main: Callable[[], int | None]) -> None:
    """Runs a command's ``main`` and turns a :class:`UserError` into one line and exit code 2.

    Args:
        main: The program; returns its exit code, or None for 0.

    Raises:
        SystemExit: Always, with the program's exit code.
    """
    try:
        code = main() or 0
    except UserError as error:
        print_error(str(error))
        code = USAGE_EXIT_CODE
    except KeyboardInterrupt:
        print_error("interrupted")
        code = 130
    sys.exit(code)
