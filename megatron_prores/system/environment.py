"""What surrounds a run: the launcher's variables (torchrun's), and the machine that it is for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import resource
from collections.abc import Mapping
from typing import Any

from megatron_prores.errors import UserError

_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")

_OPEN_FILES = 4096
_FEWEST_OPEN_FILES = 256
"""A rank on the CPU device has some 150 open; each data worker and each other rank adds to it."""

_LAUNCHER = "start the program with torchrun, which sets it"


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse what a launcher cannot have meant.

    Args:
        environment: The process's environment.

    Raises:
        UserError: Names the variable and its value.
    """
    numbers: dict[str, int] = {}
    for name in _NUMBERS:
        if text := environment.get(name):
            if not (text.isascii() and text.isdigit()):
                raise UserError(f"the environment has {name}={text}: must be a whole number")
            numbers[name] = int(text)
    if ("RANK" in numbers) != ("WORLD_SIZE" in numbers):
        given, missing = sorted(("RANK", "WORLD_SIZE"), key=lambda name: name not in numbers)
        raise UserError(
            f"the environment has {given}={numbers[given]}, but no {missing}: {_LAUNCHER}"
        )
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if size in numbers and numbers.get(rank, 0) >= numbers[size]:
            raise UserError(
                f"the environment has {rank}={numbers.get(rank, 0)} and {size}={numbers[size]}: "
                f"ranks are numbered from 0 and are less than {size}"
            )


def raise_open_files() -> None:
    """Raise this process's limit of open files as far as a run may need, where it may be raised.

    Raises:
        UserError: It stays too low: libraries then fail anywhere, each in its own words.
    """
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if limit != unlimited and limit < _OPEN_FILES:
        limit = _OPEN_FILES if most == unlimited else min(most, _OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
        if limit < _FEWEST_OPEN_FILES:
            raise UserError(
                f"ulimit -n is {limit}: a process may open no more files, and a rank needs about "
                f"{_FEWEST_OPEN_FILES}; have the hard limit raised (ulimit -H -n)"
            )


def check_address(environment: Mapping[str, str]) -> None:
    """Refuse a run whose ranks would not find each other.

    Raises:
        UserError: Names the variable.
    """
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise UserError(f"the environment has no {name}: {_LAUNCHER}")


def is_installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


class TargetEnvironment:
    """The machine that a command line is checked for: this one.

    The checks of a command line ask it about packages, paths and GPUs. The planner hands them one
    that stands for another machine.
    """

    has_this_gpu = True
    """Whether the run's GPUs are those of this machine, so that they can be asked."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        """What was not checked, or taken as given; each once."""

    def note(self, text: str) -> None:
        """Add a note unless it is there."""
        if text not in self.notes:
            self.notes.append(text)

    def is_installed(self, module: str) -> bool:
        """Return whether a module can be imported there."""
        return is_installed(module)

    def version_below(self, package: str, least: str) -> str | None:
        """Return the installed version of a package where it is older than needed.

        Args:
            package: The name of the distribution.
            least: The oldest version that will do.

        Returns:
            None where the version will do, and where the package is not installed.
        """
        from packaging.version import Version

        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None
        return found if Version(found) < Version(least) else None

    def is_elsewhere(self, *paths: str) -> bool:
        """Return whether none of these paths is on this machine, and they may be on the target."""
        return False

    def check_writable(self, flag: str, path: str) -> None:
        """Refuse a directory of output that cannot be made or written to.

        Raises:
            UserError: Names the flag and the path.
        """
        nearest = os.path.abspath(path)
        while not os.path.lexists(nearest):
            nearest = os.path.dirname(nearest)
        if not os.path.isdir(nearest):
            raise UserError(f"{flag} {path}: {nearest} is not a directory")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"{flag} {path}: {nearest} cannot be written to")

    def stand_in_tokenizer(self, args: Any) -> Any | None:
        """Return what takes the place of a tokenizer that only the target machine can build.

        Args:
            args: Validated by Megatron.

        Returns:
            None where the tokenizer is to be built here.
        """
        return None


THIS_MACHINE = TargetEnvironment()
