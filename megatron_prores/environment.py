"""What surrounds a run: the launcher's variables (torchrun's), and the optional packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from megatron_prores.errors import UserError

_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")

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


def check_address(environment: Mapping[str, str]) -> None:
    """Refuse a run whose ranks would not find each other.

    Raises:
        UserError: Names the variable.
    """
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise UserError(f"the environment has no {name}: {_LAUNCHER}")


_taken_as_installed: list[str] | None = None


def is_installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    if importlib.util.find_spec(module) is not None:
        return True
    if _taken_as_installed is None:
        return False
    if module not in _taken_as_installed:
        _taken_as_installed.append(module)
    return True


def version_below(package: str, least: str) -> str | None:
    """Return the installed version of a package where it is older than needed.

    Args:
        package: The name of the distribution.
        least: The oldest version that will do.

    Returns:
        None where the version will do, where the package is not installed, and where packages are
        taken as installed.
    """
    from packaging.version import Version

    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    if Version(found) >= Version(least):
        return None
    if _taken_as_installed is None:
        return found
    if (needed := f"{package}>={least}") not in _taken_as_installed:
        _taken_as_installed.append(needed)
    return None


@contextmanager
def every_package() -> Iterator[list[str]]:
    """Answer for another machine than this one: there, every optional package is installed.

    Yields:
        The packages that were asked for and are not here, as they come.
    """
    global _taken_as_installed
    before, _taken_as_installed = _taken_as_installed, []
    try:
        yield _taken_as_installed
    finally:
        _taken_as_installed = before
