"""What a run has logged: its curves, its settings, and the numbers that sum it up."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_prores.errors import Argument, ArgumentError, UserError
from megatron_prores.runs.spikes import spike_score

TRAIN_TAG = "lm loss"
VALID_TAG = "lm loss validation"
GRAD_NORM_TAG = "grad-norm"
_BATCH_TAG = "batch-size"
"""Logged with every step, whatever became of it."""

EMA_WEIGHT = 0.99
"""Of the training loss: the paper's (Figure 5)."""

FEWEST_FINAL_STEPS = 10
"""Logged steps of the final training loss; of a longer run it is the last 1%."""

_EVENT_FILES = "*tfevents*"
_TEXT = "/text_summary"
"""What torch's ``add_text``, with which Megatron logs its arguments, adds to a tag."""


@dataclass(frozen=True)
class Series:
    """A scalar over iterations, or over what has been made of them: tokens, hours."""

    steps: npt.NDArray[Any]
    """Iterations (or tokens, hours), rising; of a smoothed series, their means."""
    values: npt.NDArray[np.float64]

    def finite(self) -> Series:
        """Return the series without infinite values and NaN."""
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.values[keep])


@dataclass(frozen=True)
class Run:
    """What a run has logged so far, all its starts together."""

    name: str
    settings: dict[str, str]
    """Megatron's arguments by their names (``seq_length``), as text, of the newest start."""
    scalars: dict[str, Series]
    """By tag, over iterations."""
    tokens: Series
    """Tokens consumed since the run began, over iterations."""
    hours: Series
    """Hours of training over iterations: of each start from its first logged step on, work that
    was lost and done again included, the time between the starts left out."""

    def over_tokens(self, tag: str) -> Series:
        """Return a scalar over tokens; an empty series where it was not logged."""
        return self._over(self.tokens, tag)

    def over_hours(self, tag: str) -> Series:
        """Return a scalar over hours of training; an empty series where it was not logged."""
        return self._over(self.hours, tag)

    def tokens_per_second(self) -> Series:
        """Return the throughput of each logged step, over iterations."""
        seconds = np.diff(self.hours.values) * 3600
        keep = seconds > 0  # a start begins where the clock of the one before it stopped
        rates = np.diff(self.tokens.values)[keep] / seconds[keep]
        return Series(self.hours.steps[1:][keep], rates)

    def _over(self, axis: Series, tag: str) -> Series:
        series = self.scalars.get(tag, EMPTY)
        # An evaluation may come before the first step.
        steps = np.interp(series.steps, np.append(0, axis.steps), np.append(0.0, axis.values))
        return Series(steps, series.values)


EMPTY = Series(np.array([], np.int64), np.array([]))
"""Of a scalar that was not logged."""


def read_scalars(tensorboard_dir: Path) -> dict[str, Series]:
    """Read every scalar of a run, resumed or not.

    Args:
        tensorboard_dir: The run's ``--tensorboard-dir``. Each start of a run writes an event file;
            where it begins, what earlier ones logged ends.

    Returns:
        The scalars by tag, over iterations ("... vs samples": over samples).

    Raises:
        UserError: The folder is missing or holds no scalar.
    """
    if not tensorboard_dir.is_dir():
        raise UserError(f"--tensorboard-dir {tensorboard_dir}: no such folder")
    starts = _read_starts(tensorboard_dir)
    if not starts:
        raise UserError(
            f"--tensorboard-dir {tensorboard_dir}: no TensorBoard event files "
            f"({_EVENT_FILES}) in it"
        )
    scalars = _scalars(starts)
    if not scalars:
        raise UserError(f"--tensorboard-dir {tensorboard_dir}: its event files hold no scalars")
    return scalars


def load_run(path: Path, name: str | None = None) -> Run:
    """Read a run of the main program, or of Megatron's, finished or still going on.

    Args:
        path: Its directory with ``tensorboard`` in it (the launch scripts' ``RUN_DIR``), its
            ``--save`` beside that, or its ``--tensorboard-dir`` itself.
        name: What to call it; the default is the name of its directory.

    Returns:
        The run. Its tokens are Megatron's consumed samples x ``--seq-length``.

    Raises:
        UserError: There is no such directory, or it holds no training step that Megatron logged.
    """
    read = [(start, _samples(start)) for start in _read_starts(tensorboard_dir(path))]
    trained = [(start, samples) for start, samples in read if samples is not None]
    trained.sort(key=lambda each: each[1].written[0])
    starts, samples = [start for start, _ in trained], [samples for _, samples in trained]
    scalars = _scalars(starts)
    if TRAIN_TAG not in scalars:
        raise UserError(f"{path}: no training step is logged in it (no scalar {TRAIN_TAG!r})")
    settings = starts[-1].settings
    if "seq_length" not in settings:
        raise UserError(
            f"{path}: the arguments of its run are not in its logs, where Megatron writes them; "
            "tokens cannot be counted without --seq-length"
        )
    consumed = _join(samples)
    return Run(
        name=_name(path) if name is None else name,
        settings=settings,
        scalars=scalars,
        tokens=Series(consumed.steps, consumed.values * int(settings["seq_length"])),
        hours=_join(_hours(samples)),
    )


def tensorboard_dir(path: Path) -> Path:
    """Return the directory of a run's event files; the path is one of :func:`load_run`'s.

    Raises:
        UserError: There is no such directory, or no event file in it.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such directory")
    places = [path, path / "tensorboard"]
    if (path / "latest_checkpointed_iteration.txt").is_file():
        places.append(path.absolute().parent / "tensorboard")
    for place in places:
        if any(place.glob(_EVENT_FILES)):
            return place
    raise UserError(
        f"{path}: no TensorBoard event files ({_EVENT_FILES}) in it or in {path / 'tensorboard'}; "
        "give the run's directory or its --tensorboard-dir"
    )


def ema(values: npt.ArrayLike, weight: float = EMA_WEIGHT) -> npt.NDArray[np.float64]:
    """Compute the exponential moving average, without bias towards a start at 0, as TensorBoard.

    Args:
        values: A value per logged step, shape [n].
        weight: Of what came before, from 0 (no smoothing) to below 1.

    Returns:
        The averages, shape [n]. What is infinite or NaN stays as it is, and no average holds it.

    Raises:
        ArgumentError: The weight is not from 0 to below 1.
    """
    if not 0 <= weight < 1:
        raise ArgumentError(Argument("weight", weight), ": must be at least 0 and below 1")
    smooth = np.array(values, dtype=np.float64)
    total, share = 0.0, 0.0  # of the values so far, and of the weights that they have together
    for index in np.flatnonzero(np.isfinite(smooth)):
        total = weight * total + (1 - weight) * smooth[index]
        share = weight * share + (1 - weight)
        smooth[index] = total / share
    return smooth


def gap(run: Run, reference: Run, tag: str = TRAIN_TAG, weight: float = EMA_WEIGHT) -> Series:
    """Compute by how much a run's loss differs from another's at the same token (paper, Figure 5).

    Args:
        run: The one whose loss is looked at.
        reference: The one it is compared with; between its logged steps its loss is interpolated.
        tag: The loss; :data:`VALID_TAG` wants ``weight=0``, as it has few points.
        weight: Of :func:`ema`, by which both are smoothed first.

    Returns:
        Loss of ``run`` minus loss of ``reference`` over tokens, at the logged steps of ``run`` that
        lie within both; below 0 where ``run`` is better. Empty where they have no tokens in common.
    """
    ours, theirs = (each.over_tokens(tag).finite() for each in (run, reference))
    if not len(theirs.steps):
        return EMPTY
    common = (ours.steps >= theirs.steps[0]) & (ours.steps <= theirs.steps[-1])
    steps = ours.steps[common]
    beside = np.interp(steps, theirs.steps, ema(theirs.values, weight))
    return Series(steps, ema(ours.values, weight)[common] - beside)


def summary(run: Run) -> dict[str, float]:
    """Compute the numbers that sum a run up.

    Returns:
        By name; NaN where the run has not logged what a number needs:

        - ``iterations``, ``tokens``, ``hours`` of training so far (:class:`Run` says which);
        - ``tokens_per_second``: median of the logged steps;
        - ``train_loss``: mean of the last ``train_loss_steps`` logged steps, those that are no
          number left out: the last 1%, at least :data:`FEWEST_FINAL_STEPS`;
        - ``valid_loss``, ``valid_loss_best``: of the last evaluation, and the lowest;
          ``perplexity``: exp of the last;
        - ``grad_norm_max``: the largest finite one, before clipping;
        - ``loss_spike_score``, ``grad_norm_spike_score``: shares of steps, from 0 to 1
          (:mod:`megatron_prores.runs.spikes`);
        - ``nan_iterations``: logged steps whose loss or gradient norm is infinite or NaN;
        - ``skipped_iterations``: logged steps with a loss and without a gradient norm, which
          Megatron leaves out where it skips the update; NaN where it logged none at all.
    """
    train = run.scalars[TRAIN_TAG]
    valid = run.scalars.get(VALID_TAG, EMPTY)
    norms = run.scalars.get(GRAD_NORM_TAG, EMPTY)
    final = train.values[-max(FEWEST_FINAL_STEPS, math.ceil(len(train.values) / 100)) :]
    bad = [each.steps[~np.isfinite(each.values)] for each in (train, norms)]
    skipped = np.setdiff1d(train.steps, norms.steps)
    with np.errstate(over="ignore"):
        perplexity = np.exp(valid.values[-1:])
    return {
        "iterations": float(run.tokens.steps[-1]),
        "tokens": float(run.tokens.values[-1]),
        "hours": float(run.hours.values[-1]),
        "tokens_per_second": _of_finite(np.median, run.tokens_per_second().values),
        "train_loss": _of_finite(np.mean, final),
        "train_loss_steps": float(len(final)),
        "valid_loss": float(valid.values[-1]) if len(valid.values) else math.nan,
        "valid_loss_best": _of_finite(np.min, valid.values),
        "perplexity": float(perplexity[0]) if len(perplexity) else math.nan,
        "grad_norm_max": _of_finite(np.max, norms.values),
        "loss_spike_score": spike_score(train.values),
        "grad_norm_spike_score": spike_score(norms.values),
        "nan_iterations": float(len(np.union1d(*bad))),
        "skipped_iterations": float(len(skipped)) if len(norms.steps) else math.nan,
    }


class _Points(NamedTuple):
    """A scalar as an event file has it, each array of shape [n]."""

    written: npt.NDArray[np.float64]
    """Seconds since the epoch."""
    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Start:
    """What one start of a run has logged: an event file."""

    points: dict[str, _Points]
    """By tag."""
    settings: dict[str, str]


def _read_starts(directory: Path) -> list[_Start]:
    # File by file: read together, the library would drop events that it takes for leftovers of a
    # restart. The end of a file that is being written is passed over.
    return [_read_start(file) for file in sorted(directory.glob(_EVENT_FILES))]


def _read_start(file: Path) -> _Start:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    events = EventAccumulator(str(file), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()
    points = {tag: _points(events.Scalars(tag)) for tag in tags["scalars"]}
    settings = {
        tag.removesuffix(_TEXT): events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in tags["tensors"]
        if tag.endswith(_TEXT)
    }
    return _Start(points, settings)


def _points(events: Sequence[Any]) -> _Points:
    return _Points(
        np.array([event.wall_time for event in events]),
        np.array([event.step for event in events], np.int64),
        np.array([event.value for event in events]),
    )


def _scalars(starts: Sequence[_Start]) -> dict[str, Series]:
    tags = dict.fromkeys(tag for start in starts for tag in start.points)
    return {
        tag: _join(start.points[tag] for start in starts if tag in start.points) for tag in tags
    }


def _join(starts: Iterable[_Points]) -> Series:
    """Join what the starts of a run have logged of a scalar, each from its own first step on."""
    joined = EMPTY
    for points in sorted(starts, key=lambda points: points.written[0]):
        # The first of a step: Megatron ends with the test set under the tag and the step of the
        # last validation.
        steps, first = np.unique(points.steps, return_index=True)
        before = joined.steps < steps[0]
        joined = Series(
            np.append(joined.steps[before], steps),
            np.append(joined.values[before], points.values[first]),
        )
    return joined


def _samples(start: _Start) -> _Points | None:
    """Return the consumed samples, which Megatron logs as the steps of "... vs samples"."""
    over_iterations = start.points.get(_BATCH_TAG)
    over_samples = start.points.get(f"{_BATCH_TAG} vs samples")
    if over_iterations is None or over_samples is None:
        return None
    # The last of a file that is being written may have no partner yet.
    known = len(over_samples.steps)
    samples = over_samples.steps.astype(np.float64)
    return _Points(over_iterations.written[:known], over_iterations.steps[:known], samples)


def _hours(clocks: Sequence[_Points]) -> list[_Points]:
    hours, before = [], 0.0
    for clock in clocks:
        hours.append(clock._replace(values=before + (clock.written - clock.written[0]) / 3600))
        before = hours[-1].values[-1]
    return hours


def _name(path: Path) -> str:
    path = Path(os.path.abspath(path))  # "." has a name too, and a link keeps its own
    return path.parent.name if path.name in ("tensorboard", "checkpoints") else path.name


def _of_finite(reduce: Callable[..., Any], values: npt.NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(reduce(finite)) if len(finite) else math.nan
