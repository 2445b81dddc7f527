"""Reads a table of alpha by step and layer from the bytes of a CSV or JSON file.

The file is data: nothing in it is executed or evaluated. Every value is checked here, so that what
comes out is finite, within [0, 1] and of one shape.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prores.schedule.formulas import Alphas

MAX_STEP = 2**53
"""Up to here a step is exact as a float64."""

_Row = tuple[str, Any, Sequence[Any]]
"""(where it stands in the file, its step, its alphas), unchecked."""

_CSV_HEADER = "step,1,2,...,L: the step, then one column per layer"
_JSON_SHAPE = '{"steps": [t, ...], "alpha": [[alpha of layer 1, ..., of layer L], ...]}'


def parse_table(data: bytes, ending: str) -> tuple[NDArray[np.int64], Alphas]:
    """Read a table and check every value of it.

    Args:
        data: What the file holds, UTF-8 text.
        ending: ``.csv`` or ``.json``.

    Returns:
        The steps (iterations), strictly rising, int64 [R], and alpha, float64 [R, L], with at least
        one row and one layer.

    Raises:
        ValueError: What is wrong, and where: the line, the row, the layer.
    """
    try:
        text = data.decode("utf-8-sig")  # spreadsheets put a byte order mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise ValueError("the file is empty")
    return _checked(_csv_rows(text) if ending == ".csv" else _json_rows(text))


def _csv_rows(text: str) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [cell.strip() for cell in next(reader)]
        if len(header) < 2 or header != ["step", *map(str, range(1, len(header)))]:
            raise ValueError(f"the first line must be {_CSV_HEADER}; it is {_shown(header)}")
        for cells in reader:
            if not cells:
                continue  # an empty line
            where = f"line {reader.line_num}"
            if len(cells) != len(header):
                raise ValueError(
                    f"{where} has {len(cells)} values, the first line has {len(header)}"
                )
            step, *alphas = map(_csv_number, cells)
            yield where, step, alphas
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: not CSV: {error}") from error


def _csv_number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell  # refused below, where its place is known


def _json_rows(text: str) -> Iterator[_Row]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(table, dict) or set(table) != {"steps", "alpha"}:
        raise ValueError(f"must be {_JSON_SHAPE}, with these two names and no other")
    for name, rows in table.items():
        if not isinstance(rows, list):
            raise ValueError(f"{name!r} must be a list, as in {_JSON_SHAPE}")
    if len(table["steps"]) != len(table["alpha"]):
        raise ValueError(
            f"{len(table['steps'])} steps, but {len(table['alpha'])} rows of alpha: every step "
            "needs its row"
        )
    for number, (step, alphas) in enumerate(zip(table["steps"], table["alpha"], strict=True), 1):
        where = f"row {number}"
        if not isinstance(alphas, list) or not alphas:
            raise ValueError(f"{where} of 'alpha' must be a list of one alpha per layer")
        if len(alphas) != len(table["alpha"][0]):
            raise ValueError(
                f"{where} of 'alpha' has {len(alphas)} values, row 1 has {len(table['alpha'][0])}"
            )
        yield where, step, alphas


def _checked(rows: Iterable[_Row]) -> tuple[NDArray[np.int64], Alphas]:
    """Check the numbers of all rows, and stack them."""
    steps: list[int] = []
    table: list[Alphas] = []
    for where, step, alphas in rows:
        if not (_is_number(step) and 0 <= step <= MAX_STEP and step == int(step)):
            raise ValueError(
                f"{where}: step {_shown(step)} is not a whole number of iterations from 0 to 2^53"
            )
        if steps and step <= steps[-1]:
            raise ValueError(
                f"{where}: step {int(step)} comes after step {steps[-1]}; the steps must rise from "
                "row to row"
            )
        for layer, alpha in enumerate(alphas, 1):
            if not (_is_number(alpha) and 0 <= alpha <= 1):  # NaN fails both comparisons
                raise ValueError(
                    f"{where}, layer {layer}: alpha {_shown(alpha)} is not a number from 0 to 1"
                )
        steps.append(int(step))
        table.append(np.array(alphas, dtype=np.float64))
    if not steps:
        raise ValueError("the table has no rows: give at least one step with its alphas")
    return np.array(steps, dtype=np.int64), np.stack(table)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """Quote a value of the file, not longer than fits a line."""
    text = repr(value) if not isinstance(value, list) else ",".join(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
