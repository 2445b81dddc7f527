"""A user's own schedule: a table in a file (``file:PATH``), or a function (``module:function``).

Both give alpha(l, t) as the built-in ones of formulas.py do, in the same notation; alpha need not
rise. Nothing here needs torch or Megatron.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prores.errors import Argument, ArgumentError
from megatron_prores.schedule.formulas import Alphas, find_opening_steps
from megatron_prores.schedule.table import parse_table

FILE = "file:"
MAX_FILE_BYTES = 64 * 2**20
"""Some thousand rows for a hundred layers; every rank reads all of it."""

ScheduleFunction = Callable[[int, int, int], Any]
"""(step t, layers L, warmup W in iterations) -> alpha of layer 1..L, a sequence of L numbers."""

_SEARCHED_STEPS = 1000
"""Into how many parts a function's 2 W iterations are divided to find where its layers open."""


@dataclass(frozen=True, eq=False)
class FileSchedule:
    """alpha(l, t) from a table: linear between its rows, constant before the first, after the last.

    Interpolated in float64, and exactly the table's numbers at its rows.
    """

    name: str
    """As the user gave it, ``file:PATH``."""
    steps: NDArray[np.int64]
    """t of each row (iterations), strictly rising, [R]."""
    table: Alphas
    """alpha by row and layer, within [0, 1], [R, L]."""
    digest: str
    """sha256 of the file, in hexadecimal."""

    @property
    def last_step(self) -> int:
        """The step of the last row, from which on nothing moves."""
        return int(self.steps[-1])

    def check(self, num_layers: int, warmup: int) -> None:
        """Refuse a table for another number of layers.

        Args:
            num_layers: L, the layers of the whole model.
            warmup: Not used; the file has its own steps.

        Raises:
            ArgumentError: The table has not one column per layer.
        """
        if (columns := self.table.shape[1]) != num_layers:
            raise ArgumentError(
                Argument("schedule", self.name),
                f": the table is for {columns} layers, the model has {num_layers} (",
                Argument("num_layers"),
                "); give one alpha per layer",
            )

    def alphas(self, step: int, num_layers: int, warmup: int) -> Alphas:
        """Return alpha(1..L, step), float64 [L]. Arguments and errors as :meth:`check`."""
        self.check(num_layers, warmup)
        row = int(np.searchsorted(self.steps, step, side="right")) - 1
        if row < 0 or row == len(self.steps) - 1:
            return self.table[max(row, 0)].copy()
        start, end = self.steps[row : row + 2]
        low, high = self.table[row : row + 2]
        # In this form a layer that stands still keeps its number to the last bit.
        return low + (high - low) * ((step - start) / (end - start))

    def opening_steps(self, num_layers: int, warmup: int) -> list[int | None]:
        """Return for layer 1..L the first step from which alpha stays 1, None where it never does.

        Arguments and errors as :meth:`check`.
        """
        # Between two rows alpha only rises or only falls.
        return find_opening_steps(
            lambda step: self.alphas(step, num_layers, warmup),
            sorted({0, *map(int, self.steps)}),
        )


@dataclass(frozen=True, eq=False)
class FunctionSchedule:
    """alpha(l, t) from a user's function, every result of which is checked."""

    name: str
    """As the user gave it, ``module:function``."""
    function: ScheduleFunction
    digest: str | None
    """sha256 of the module's own file, in hexadecimal; None where it has none."""

    def check(self, num_layers: int, warmup: int) -> None:
        """Call the function around the steps that matter, forwards and then backwards.

        Args:
            num_layers: L, the layers of the whole model.
            warmup: W, the length of the whole warmup (iterations).

        Raises:
            ArgumentError: It raises an error, returns anything else than L numbers from 0 to 1, or
                does not return the same again for the same step.
        """
        around = (0, 1, warmup // 2, warmup - 1, warmup, warmup + 1, 2 * warmup)
        steps = sorted({step for step in around if step >= 0})
        first = {step: self.alphas(step, num_layers, warmup) for step in steps}
        for step in reversed(steps):
            if not np.array_equal(self.alphas(step, num_layers, warmup), first[step]):
                raise _refusal(
                    self.name,
                    f"called twice for step {step} it returned different numbers; it must depend "
                    "on step, layers and warmup alone, or ranks and resumed runs disagree",
                )

    def alphas(self, step: int, num_layers: int, warmup: int) -> Alphas:
        """Return alpha(1..L, step), float64 [L]. Arguments as :meth:`check`.

        Raises:
            ArgumentError: The function raises an error, or returns anything else than L numbers
                from 0 to 1.
        """
        where = f"at step {step}, for {num_layers} layers"
        try:
            result = self.function(step, num_layers, warmup)
        except Exception as error:
            raise _refusal(self.name, f"{where}, it raised {_described(error)}") from error
        try:
            return _checked(result, num_layers)
        except ValueError as error:
            raise _refusal(self.name, f"{where}, {error}") from error

    def opening_steps(self, num_layers: int, warmup: int) -> list[int | None]:
        """Return for layer 1..L the first step from which alpha stays 1, None where it never does.

        As far as the first 2 W iterations show it, and but for a dip that is shorter than a
        thousandth of them. Arguments as :meth:`check`, errors as :meth:`alphas`.
        """
        searched = np.linspace(0, 2 * warmup, _SEARCHED_STEPS + 1).round()
        return find_opening_steps(
            lambda step: self.alphas(step, num_layers, warmup),
            sorted({int(step) for step in searched}),
        )


CustomSchedule = FileSchedule | FunctionSchedule


def is_custom(schedule: str) -> bool:
    """Tell ``file:PATH`` and ``module:function`` from the name of a built-in schedule."""
    return ":" in schedule


def check_name(schedule: str) -> None:
    """Refuse what names neither a file nor a function, without looking for either.

    Raises:
        ArgumentError: It is neither ``file:PATH``, ending in .csv or .json, nor
            ``module:function``.
    """
    if schedule.startswith(FILE):
        if _path_of(schedule).suffix.lower() not in (".csv", ".json"):
            raise _refusal(schedule, "the name must end in .csv or .json")
        return
    module_name, _, function_name = schedule.partition(":")
    if not all(name.isidentifier() for name in [*module_name.split("."), function_name]):
        raise _refusal(schedule, "write file:PATH for a table, or module:function")


def load_schedule(schedule: str) -> CustomSchedule:
    """Read the file, or import the function.

    Args:
        schedule: ``file:PATH``, ending in .csv or .json, or ``module:function``, from PYTHONPATH or
            the current directory.

    Returns:
        The schedule; whether it fits a model is up to its ``check``.

    Raises:
        ArgumentError: The file cannot be read or its table is wrong; the module cannot be
            imported, or has no such function.
    """
    check_name(schedule)
    if schedule.startswith(FILE):
        return _load_file(schedule)
    module_name, _, function_name = schedule.partition(":")
    module = _import(schedule, module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        problem = "is no function" if hasattr(module, function_name) else "is not in it"
        raise _refusal(schedule, f"{module_name} was imported, but {function_name} {problem}")
    source = getattr(module, "__file__", None)
    digest = _sha256(Path(source).read_bytes()) if source and os.path.isfile(source) else None
    return FunctionSchedule(schedule, function, digest)


def _load_file(schedule: str) -> FileSchedule:
    path = _path_of(schedule)
    try:
        if path.exists() and not path.is_file():
            raise _refusal(schedule, "not a file")  # a pipe would empty itself
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _refusal(
            schedule, f"cannot read it: {error.strerror}; every node needs this file"
        ) from error
    if len(data) > MAX_FILE_BYTES:
        raise _refusal(
            schedule,
            f"more than {MAX_FILE_BYTES // 2**20} MiB; alpha is interpolated, so that only the "
            "corners of its curves need a row",
        )
    try:
        steps, table = parse_table(data, path.suffix.lower())
    except ValueError as error:
        raise _refusal(schedule, str(error)) from error
    return FileSchedule(schedule, steps, table, _sha256(data))


def _path_of(schedule: str) -> Path:
    return Path(os.path.expanduser(schedule.removeprefix(FILE)))


def _refusal(schedule: str, problem: str) -> ArgumentError:
    return ArgumentError(Argument("schedule", schedule), f": {problem}")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _import(schedule: str, module_name: str) -> ModuleType:
    try:
        with _current_directory_last():
            return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise _refusal(
            schedule,
            f"cannot import {module_name}: {_described(error)}; it must be importable from "
            "PYTHONPATH or the current directory",
        ) from error


@contextmanager
def _current_directory_last() -> Iterator[None]:
    """Make the current directory importable, behind all else, so that it hides no package."""
    directory = os.getcwd()
    is_new = directory not in sys.path
    if is_new:
        sys.path.append(directory)
    try:
        yield
    finally:
        # Left there, it would offer its folders to later imports: W&B's output is called wandb.
        if is_new and directory in sys.path:
            sys.path.remove(directory)


def _described(error: BaseException) -> str:
    """Say what was raised and, where it was in the user's code, in which line."""
    ours = (__file__, importlib.__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in ours and not frame.filename.startswith("<")
    ]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _checked(result: Any, num_layers: int) -> Alphas:
    """Make float64 [L] of what a function returned, or say what is wrong with it."""
    needed = f"it must return {num_layers} numbers from 0 to 1, one per layer"
    try:
        values = np.asarray(result)
    except Exception as error:  # ragged lists; or whatever a user's type does
        raise ValueError(f"it returned no numbers: {needed}") from error
    if values.dtype.kind not in "biuf":
        raise ValueError(f"it returned {type(result).__name__}: {needed}")
    if values.shape != (num_layers,):
        raise ValueError(f"it returned numbers of shape {list(values.shape)}: {needed}")
    values = values.astype(np.float64)  # a copy: the user may change what was returned
    wrong = np.flatnonzero(~((values >= 0) & (values <= 1)))  # NaN is neither
    if wrong.size:
        layer = int(wrong[0])
        raise ValueError(f"alpha of layer {layer + 1} is {values[layer]}: {needed}")
    return values
