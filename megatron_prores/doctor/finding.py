"""What a check finds, and where it looks."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

OK = "ok"
NOTE = "note"
"""Works, but the user should know."""
MISSING = "missing"
"""Is not there, or cannot be used."""

GIB = 2**30

COMMAND_SECONDS = 20
"""For a command of the machine: nvidia-smi can hang when a GPU has fallen off the bus."""


@dataclass(frozen=True)
class Finding:
    """What a check says; the table that has the check gives it its name."""

    status: str
    """OK, NOTE or MISSING."""
    value: str
    """What was found: a version, a number."""
    cost: str = ""
    """What it means for a run, and what to do; empty where all is well."""


@dataclass
class Where:
    """Where the checks look: this machine, or in the tests one that is made up."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    root: Path = Path("/")
    """Of the file system: /proc, /sys, /dev."""
    save: Path = Path()
    """Where checkpoints are to go."""
    _answers: dict[tuple[str, ...], str | None] = field(default_factory=dict)

    def read(self, path: str) -> str | None:
        """Return the stripped text of a file below the root; None where it cannot be read."""
        try:
            return (self.root / path).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None

    def names(self, path: str) -> list[str]:
        """List a directory below the root; nothing where there is none."""
        try:
            return sorted(os.listdir(self.root / path))
        except OSError:
            return []

    def run(self, *command: str) -> str | None:
        """Return what a command prints, asked once; None where it is not there, or fails."""
        if command not in self._answers:
            self._answers[command] = self._run(command)
        return self._answers[command]

    def _run(self, command: tuple[str, ...]) -> str | None:
        if shutil.which(command[0], path=self.environ.get("PATH")) is None:
            return None
        try:
            result = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
                stdin=subprocess.DEVNULL,
                env=dict(self.environ),
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return result.stdout if result.returncode == 0 else None


Check = Callable[[Where], Finding]


def examine(check: Check, where: Where) -> Finding:
    """Run a check. One that fails is a finding as well: the others must be told."""
    try:
        return check(where)
    except Exception as error:
        return Finding(MISSING, f"the check failed: {one_line(error)}")


def one_line(error: BaseException | str, length: int = 200) -> str:
    """Return the words of an error on one line, cut where they are long."""
    words = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    words = " ".join(words.split())
    return words if len(words) <= length else words[: length - 3] + "..."


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep imports from printing: also what C code writes past Python."""
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        for stream in (1, 2):
            saved = os.dup(stream)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, stream)
            os.dup2(nowhere.fileno(), stream)
        yield


def gib(size: float) -> str:
    """Return a number of bytes in GiB, or in MiB below one."""
    return f"{size / GIB:.0f} GiB" if size >= 10 * GIB else _small(size)


def _small(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"
