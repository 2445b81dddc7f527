"""The curves of runs in one picture, a panel per quantity."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_prores.runs.logged import (
    EMA_WEIGHT,
    EMPTY,
    GRAD_NORM_TAG,
    TRAIN_TAG,
    VALID_TAG,
    Run,
    Series,
    ema,
    gap,
)
from megatron_prores.runs.plot import size_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RMS_TAG = re.compile(r"prores/residual_rms/layer_(\d+)")
"""Root mean square of the residual stream behind a layer."""

_COLUMNS = 3
_MEDIANS = 200
"""Points of the throughput's curve, of at least 5 steps each: evaluations do not show in it."""


@dataclass(frozen=True)
class _Panel:
    """A panel of the picture: a curve of each run; left out where no run has one."""

    title: str
    curve: Callable[[Run, Run, float], Series]
    """Of a run, the first run, and the weight of the moving average."""
    x: str = "tokens"
    style: dict[str, Any] = field(default_factory=lambda: {"linewidth": 1.2})
    log: bool = False
    zero: bool = False
    """Whether a line at 0 stands for the first run."""


def draw_runs(runs: Sequence[Run], weight: float = EMA_WEIGHT) -> Figure:
    """Draw the curves of runs, a panel per quantity that any of them has logged.

    Args:
        runs: The first is the one that gaps are measured from.
        weight: Of the moving average of the training loss.
    """
    # Figure itself, not pyplot: no window system, no global state, nothing to close.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    drawn = []
    for panel in _PANELS:
        curves = [panel.curve(run, runs[0], weight) for run in runs]
        if any(len(curve.steps) for curve in curves):
            drawn.append((panel, curves))
    rows = math.ceil(len(drawn) / _COLUMNS)
    figure = Figure(figsize=(15, 0.8 + 3.6 * rows), layout="constrained", facecolor="white")
    colors: list[Any] = [f"C{number}" for number in range(len(runs))]
    if len(runs) > 10:  # as many as the cycle has
        colors = list(colormaps["turbo"](np.linspace(0.05, 0.95, len(runs))))
    for number, (panel, curves) in enumerate(drawn, start=1):
        _draw(figure.add_subplot(rows, _COLUMNS, number), panel, curves, colors)
    figure.legend(
        handles=[
            figure.axes[0].plot([], [], color=color, label=run.name)[0]
            for run, color in zip(runs, colors, strict=True)
        ],
        loc="outside upper center", ncols=min(len(runs), 6), frameon=False,
    )  # fmt: skip
    return figure


def _draw(axes: Axes, panel: _Panel, curves: Sequence[Series], colors: Sequence[Any]) -> None:
    if panel.zero:
        axes.axhline(0, color=colors[0], linewidth=1)
    for curve, color in zip(curves, colors, strict=True):
        axes.plot(curve.steps, curve.values, color=color, **panel.style)
    if panel.log:
        axes.set_yscale("log")
    if panel.x == "tokens":
        axes.xaxis.set_major_formatter(lambda value, _: size_of(value))
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel(panel.x)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _train(run: Run, _first: Run, weight: float) -> Series:
    series = run.over_tokens(TRAIN_TAG)
    return Series(series.steps, ema(series.values, weight))


def _train_over_hours(run: Run, _first: Run, weight: float) -> Series:
    series = run.over_hours(TRAIN_TAG)
    return Series(series.steps, ema(series.values, weight))


def _valid(run: Run, _first: Run, _weight: float) -> Series:
    return run.over_tokens(VALID_TAG)


def _train_gap(run: Run, first: Run, weight: float) -> Series:
    return EMPTY if run is first else gap(run, first, TRAIN_TAG, weight)


def _valid_gap(run: Run, first: Run, _weight: float) -> Series:
    return EMPTY if run is first else gap(run, first, VALID_TAG, weight=0)


def _gradient_norm(run: Run, _first: Run, _weight: float) -> Series:
    return run.over_tokens(GRAD_NORM_TAG)


def _throughput(run: Run, _first: Run, _weight: float) -> Series:
    series = run.tokens_per_second()
    if not len(series.steps):
        return EMPTY
    tokens = np.interp(series.steps, run.tokens.steps, run.tokens.values)
    parts = min(_MEDIANS, math.ceil(len(tokens) / 5))
    medians = (
        np.array([np.median(part) for part in np.array_split(each, parts)])
        for each in (tokens, series.values)
    )
    return Series(*medians)


def _last_rms(run: Run, _first: Run, _weight: float) -> Series:
    tags = _rms_tags(run)
    return run.over_tokens(tags[max(tags)]) if tags else EMPTY


def _final_rms(run: Run, _first: Run, _weight: float) -> Series:
    tags = _rms_tags(run)
    layers = sorted(tags)
    return Series(
        np.array(layers, np.int64),
        np.array([run.scalars[tags[layer]].values[-1] for layer in layers]),
    )


def _rms_tags(run: Run) -> dict[int, str]:
    """Return the scalars of the layers' residual streams, by layer from 1."""
    return {int(match[1]): tag for tag in run.scalars if (match := RMS_TAG.fullmatch(tag))}


_FEW = {"marker": "o", "markersize": 3.5, "linewidth": 1}
_PANELS = (
    _Panel("training loss, moving average", _train),
    _Panel("training loss, moving average", _train_over_hours, x="hours of training"),
    _Panel("validation loss", _valid, style=_FEW),
    _Panel("training loss minus the first run's", _train_gap, zero=True),
    _Panel("validation loss minus the first run's", _valid_gap, style=_FEW, zero=True),
    _Panel("gradient norm", _gradient_norm, style={"linewidth": 0.6, "alpha": 0.8}, log=True),
    _Panel("tokens per second", _throughput),
    _Panel("rms behind the last layer", _last_rms, log=True),
    _Panel("rms behind each layer, at the end", _final_rms, x="layer", style=_FEW, log=True),
)
