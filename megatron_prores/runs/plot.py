"""One picture of a run: its losses, and below them how the layers' residual branches opened."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_prores.errors import Parser, UserError
from megatron_prores.runs.logged import TRAIN_TAG, VALID_TAG, Series, read_scalars
from megatron_prores.system.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALPHA_TAG = re.compile(r"prores/alpha/layer_(\d+)")

_TRAIN_COLOR = "#2a6f97"
_VALID_COLOR = "#d1495b"
_SMOOTHED_ABOVE = 200
"""Points from which the eye needs a smoothed line over the raw one."""


def alpha_matrix(
    scalars: Mapping[str, Series],
) -> tuple[list[int], npt.NDArray[np.int64], npt.NDArray[np.float64]] | None:
    """Return the layers, the iterations, and alpha per layer and iteration; None without alphas."""
    tags = {int(match[1]): tag for tag in scalars if (match := ALPHA_TAG.fullmatch(tag))}
    if not tags:
        return None
    layers = sorted(tags)
    series = [scalars[tags[layer]] for layer in layers]
    steps = np.unique(np.concatenate([each.steps for each in series]))
    return layers, steps, np.array([np.interp(steps, each.steps, each.values) for each in series])


def draw_run(scalars: Mapping[str, Series], title: str | None = None) -> Figure:
    """Draw losses over iterations and, where alphas were logged, their heat map below.

    Raises:
        UserError: Neither a training nor a validation loss was logged.
    """
    # Figure itself, not pyplot: no window system, no global state, nothing to close.
    from matplotlib.figure import Figure

    alphas = alpha_matrix(scalars)
    figure = Figure(figsize=(8, 5.6 if alphas else 3.6), layout="constrained", facecolor="white")
    if alphas:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _draw_alphas(figure, lower, *alphas)
        lower.set_xlabel("iteration")
    else:
        upper = figure.subplots()
        upper.set_xlabel("iteration")
    _draw_losses(upper, scalars)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command ``tools/plot_run.py``.

    Raises:
        UserError: The logs or the output are not usable.
    """
    parser = Parser(
        description="Draw a run's losses and the warm-up of its layers from its TensorBoard logs."
    )
    parser.add_argument("--tensorboard-dir", type=Path, required=True, help="the run's event files")
    parser.add_argument("--output", type=Path, required=True, help="picture to write, .png")
    parser.add_argument("--title", help="line on top of the picture")
    args = parser.parse_args(argv)
    check_picture(args.output)
    figure = draw_run(read_scalars(args.tensorboard_dir), args.title)
    save_figure(figure, args.output)
    print(args.output)


def _draw_losses(axes: Axes, scalars: Mapping[str, Series]) -> None:
    train, valid = scalars.get(TRAIN_TAG), scalars.get(VALID_TAG)
    if train is None and valid is None:
        raise UserError(
            f"no loss in these logs: neither the tag {TRAIN_TAG!r} nor {VALID_TAG!r} "
            f"(found {len(scalars)} other tags)"
        )
    if train is not None:
        many = len(train.steps) > _SMOOTHED_ABOVE
        raw: dict[str, Any] = {"alpha": 0.3, "linewidth": 0.8} if many else {"label": "training"}
        axes.plot(train.steps, train.values, color=_TRAIN_COLOR, **raw)
        if many:
            smooth = _smooth(train, len(train.steps) // 50)
            axes.plot(smooth.steps, smooth.values, color=_TRAIN_COLOR, label="training (smoothed)")
    if valid is not None:
        axes.plot(
            valid.steps, valid.values, color=_VALID_COLOR, label="validation",
            marker="o", markersize=4, markeredgecolor="white", markeredgewidth=0.6,
        )  # fmt: skip
    axes.set_ylabel("loss (nats per token)")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _draw_alphas(
    figure: Figure,
    axes: Axes,
    layers: Sequence[int],
    steps: npt.NDArray[np.int64],
    matrix: npt.NDArray[np.float64],
) -> None:
    # A record holds until the next one; the last is drawn as wide as the one before it.
    last = steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)
    rows = np.arange(len(layers) + 1) + 0.5
    image = axes.pcolormesh(
        np.append(steps, last), rows, matrix, cmap="viridis", vmin=0, vmax=1, rasterized=True
    )
    stride = math.ceil(len(layers) / 12)
    axes.set_yticks(np.arange(1, len(layers) + 1)[::stride], [str(n) for n in layers][::stride])
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="residual scale α", pad=0.015, ticks=[0, 0.5, 1])


def _smooth(series: Series, span: int) -> Series:
    """Return means over ``span`` points, of iterations and values alike, without inf and NaN."""
    finite = series.finite()
    if len(finite.steps) < span:
        return finite
    window = np.full(span, 1 / span)
    means = (np.convolve(each, window, "valid") for each in (finite.steps, finite.values))
    return Series(*means)


def size_of(number: float) -> str:
    """Write a large number in short: 524.3K, 7.002B."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.4g}{name}"
    return f"{number:g}"


def check_picture(output: Path, flag: str = "--output") -> None:
    """Raise a :class:`UserError` unless a path can be a picture's; ``flag`` named it."""
    if output.suffix.lower() != ".png" or output.is_dir():
        raise UserError(f"{flag} {output} must name a .png file")


def save_figure(figure: Figure, output: Path, flag: str = "--output") -> None:
    """Write a figure as a PNG file: all of it, or what was there before.

    Args:
        figure: Of matplotlib.
        output: The file; its directory is made.
        flag: That named it, for the message.

    Raises:
        UserError: It cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output, "wb") as file:
            figure.savefig(file, format="png", dpi=160)
    except OSError as error:
        raise UserError(f"{flag} {output}: cannot write: {error.strerror}") from error
