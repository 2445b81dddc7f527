"""The numbers of runs and the settings in which they differ, and both as a table."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from megatron_prores.runs.logged import (
    EMA_WEIGHT,
    FEWEST_FINAL_STEPS,
    TRAIN_TAG,
    VALID_TAG,
    Run,
    gap,
    summary,
)
from megatron_prores.runs.plot import size_of

_ONLY_WHERE = re.compile(
    r"_.*|save|load|(curr_)?iteration|consumed_\w+|(local_)?rank|"
    r"\w+_dir|\w+_cache_path|\w+_run_name|wandb_\w+"
)
"""Arguments that say where a run writes and how far it was, not what it does."""

_WIDEST = 32
"""Characters of a value in the table."""

_loss = "{:.4f}".format
_share = "{:.3%}".format
_count = "{:,.0f}".format
_ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("iterations", "iterations", _count),
    ("tokens", "tokens", size_of),
    ("hours of training", "hours", "{:.3g}".format),
    ("tokens per second, median", "tokens_per_second", size_of),
    ("training loss, mean of the last", "train_loss", _loss),
    (f"  steps: 1%, at least {FEWEST_FINAL_STEPS}", "train_loss_steps", _count),
    ("validation loss, last", "valid_loss", _loss),
    ("validation loss, best", "valid_loss_best", _loss),
    ("validation perplexity, last", "perplexity", "{:.2f}".format),
    ("training loss minus the first's", "train_gap", "{:+.4f}".format),
    ("validation loss minus the first's", "valid_gap", "{:+.4f}".format),
    ("largest gradient norm", "grad_norm_max", "{:.3g}".format),
    ("spike score of the loss", "loss_spike_score", _share),
    ("spike score of the gradient norm", "grad_norm_spike_score", _share),
    ("iterations with inf or NaN", "nan_iterations", _count),
    ("skipped iterations", "skipped_iterations", _count),
)
"""Of the table: label, key, how a value is written."""


def compare(runs: Sequence[Run], weight: float = EMA_WEIGHT) -> dict[str, dict[str, float]]:
    """Compute the numbers of each run, and its gaps to the first.

    Args:
        runs: With names of their own.
        weight: Of the moving average of the training loss.

    Returns:
        By name: what :func:`megatron_prores.runs.logged.summary` says,
        ``train_gap`` and ``valid_gap``:
        the loss minus the first run's where the shorter of the two ends; NaN for the first.
    """
    found = {run.name: summary(run) for run in runs}
    for run in runs:
        for key, tag, smoothing in (("train_gap", TRAIN_TAG, weight), ("valid_gap", VALID_TAG, 0)):
            values = gap(run, runs[0], tag, smoothing).values
            known = len(values) and run is not runs[0]
            found[run.name][key] = float(values[-1]) if known else math.nan
    return found


def settings_that_differ(
    runs: Sequence[Run], everything: bool = False
) -> dict[str, dict[str, str | None]]:
    """Return Megatron's arguments in which runs differ.

    Args:
        runs: With names of their own.
        everything: Whether those that only say where a run writes are among them.

    Returns:
        Value by run (None: it has no such argument) by argument.
    """
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: {run.name: run.settings.get(name) for run in runs} for name in names}
    return {
        name: by_run
        for name, by_run in values.items()
        if len(set(by_run.values())) > 1 and (everything or not _ONLY_WHERE.fullmatch(name))
    }


def table(numbers: dict[str, dict[str, float]], settings: dict[str, dict[str, str | None]]) -> str:
    """Write what :func:`compare` and :func:`settings_that_differ` found, a column per run."""
    rows = [["", *numbers]]
    for label, key, write in _ROWS:
        values = [each[key] for each in numbers.values()]
        if not all(map(math.isnan, values)):
            rows.append([label, *("-" if math.isnan(each) else write(each) for each in values)])
    rows += [[""], ["arguments that differ" if settings else "no arguments differ"]]
    for name, by_run in settings.items():
        rows.append([name, *("-" if each is None else _short(each) for each in by_run.values())])
    widths = [max(len(row[at]) for row in rows if at < len(row)) for at in range(len(numbers) + 1)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    )


def _short(value: str) -> str:
    half = (_WIDEST - 3) // 2
    return value if len(value) <= _WIDEST else f"{value[:half]}...{value[-half:]}"
