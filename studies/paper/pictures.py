"""The pictures of the report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_prores.runs.logged import ema
from studies.paper.results import RESIDUAL_RMS
from studies.paper.scales import ARMS, LONG, PLAIN, PRORES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from studies.paper.results import Results

COLORS = {PLAIN: "#d1495b", LONG: "#edae49", PRORES: "#2a6f97"}
_WEIGHT = 0.9
"""Of the moving averages, over the points that are kept of a curve."""

LABELS = {PLAIN: "plain", LONG: "plain, long learning-rate warmup", PRORES: "ProRes"}


def _figure(
    panels: int, width: float = 4.6, height: float = 3.6, shared: bool = False
) -> tuple[Figure, list[Axes]]:
    """Build a figure of panels, at most three beside each other; shared: the vertical axis."""
    from matplotlib.figure import Figure

    columns, rows = min(panels, 3), math.ceil(panels / 3)
    size = (width * columns, height * rows)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    every = list(figure.subplots(rows, columns, squeeze=False, sharey=shared).flat)
    axes = every[:panels]
    for each in every[panels:]:
        each.remove()
    for each in axes:
        each.grid(color="0.9")
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def losses(results: Results) -> Figure | None:
    """Draw the final loss of every seed, by placement, depth and arm."""
    cases = [case for case in results.cases() if results.losses(placement=case[0], layers=case[1])]
    if not cases:
        return None
    figure, (axes,) = _figure(1, width=max(6.0, 1.3 * len(cases)))
    for at, (placement, layers) in enumerate(cases):
        for shift, arm in zip((-0.22, 0.0, 0.22), ARMS, strict=True):
            found = results.losses(placement=placement, layers=layers, arm=arm)
            values = [value for value in found.values() if math.isfinite(value)]
            if not values:
                continue
            label = LABELS[arm] if at == 0 else None
            axes.plot(
                [at + shift] * len(values), values, "o", color=COLORS[arm], alpha=0.6, label=label
            )
            axes.hlines(np.mean(values), at + shift - 0.1, at + shift + 0.1, color=COLORS[arm])
    axes.set_xticks(range(len(cases)), [f"{name}\n{layers} layers" for name, layers in cases])
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend(frameon=False)
    return figure


def depth(results: Results) -> Figure | None:
    """Draw the final loss against the number of layers."""
    figure, panels = _figure(2, shared=True)
    is_empty = True
    for axes, placement in zip(panels, ("post", "pre"), strict=True):
        for arm in ARMS:
            depths = sorted({r["layers"] for r in results.of(placement=placement, arm=arm)})
            points: list[float] = []
            for layers in depths:
                values = results.losses(placement=placement, layers=layers, arm=arm)
                finite = [value for value in values.values() if math.isfinite(value)]
                points.append(statistics.fmean(finite) if finite else math.nan)
                axes.plot([layers] * len(finite), finite, "_", color=COLORS[arm], alpha=0.6)
            if len(depths) > 1:
                axes.plot(depths, points, "o-", color=COLORS[arm], label=LABELS[arm])
                axes.set_xticks(depths)
                is_empty = False
        axes.set(title=placement, xlabel="layers")
        axes.legend(frameon=False)
    panels[0].set_ylabel("validation loss (nats per token)")
    return None if is_empty else figure


def gap(results: Results) -> Figure | None:
    """Draw the training loss of ProRes minus that of plain, over the run."""
    cases = [
        case
        for case in results.cases()
        if all(results.of(placement=case[0], layers=case[1], arm=arm) for arm in (PLAIN, PRORES))
        and len(results.losses(placement=case[0], layers=case[1], arm=PRORES)) > 1
    ]
    if not cases:
        return None
    figure, panels = _figure(len(cases), width=2.9, height=2.0, shared=True)
    for axes, (placement, layers) in zip(panels, cases, strict=True):
        plain = mean_curve(results, placement, layers, PLAIN)
        for arm in (LONG, PRORES):
            ours = mean_curve(results, placement, layers, arm)
            if ours and plain and np.array_equal(ours[0], plain[0]):  # or one of them diverged
                # Means over fiftieths of the run: a moving average would drag the start along.
                steps, difference = (
                    [part.mean() for part in np.array_split(values, min(50, len(values)))]
                    for values in (plain[0], ours[1] - plain[1])
                )
                axes.plot(steps, difference, color=COLORS[arm], label=LABELS[arm])
        axes.axhline(0.0, color="0.5", linewidth=0.8)
        axes.set(title=f"{placement}, {layers} layers", ylim=(-0.25, 0.25))
    figure.supxlabel("iteration", fontsize="medium")
    figure.supylabel("training loss minus plain's", fontsize="medium")
    entries = panels[0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside upper center", ncols=2, frameon=False)
    return figure


def growth(results: Results) -> Figure | None:
    """Draw the RMS of the residual stream behind every layer, early, midway and at the end."""
    runs = [r for r in results.all if rms_by_layer(r)]
    if not runs:
        return None
    figure, panels = _figure(len(runs), shared=True)
    for axes, run in zip(panels, runs, strict=True):
        rms = rms_by_layer(run)
        steps = run["curves"][f"{RESIDUAL_RMS}{min(rms)}"][0]
        for share, tint in ((0.1, 0.35), (0.5, 0.65), (1.0, 1.0)):
            at = min(len(steps) - 1, round(share * len(steps)))
            values = [curve[at] for curve in rms.values()]
            label = f"iteration {steps[at]:.0f}"
            axes.plot(list(rms), values, ".-", color=COLORS[run["arm"]], alpha=tint, label=label)
        axes.set(title=LABELS[run["arm"]], xlabel="layer", yscale="log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis("{x:g}")
        axes.legend(frameon=False)
    panels[0].set_ylabel("RMS of the residual stream")
    return figure


def rms_by_layer(result: Mapping[str, Any]) -> dict[int, list[float]]:
    """Return layer -> RMS of the residual stream behind it, over the run; empty if not logged."""
    found = {
        int(tag.removeprefix(RESIDUAL_RMS)): curve[1]
        for tag, curve in result["curves"].items()
        if tag.startswith(RESIDUAL_RMS)
    }
    return dict(sorted(found.items()))


def cosine(results: Results) -> Figure | None:
    """Draw the cosine of what each layer adds, early and at the end."""
    runs = [r for r in results.all if r.get("cosine")]
    if not runs:
        return None
    figure, (axes,) = _figure(1)
    for run in runs:
        layers = range(1, len(run["cosine"]) + 1)
        axes.plot(layers, run["cosine"], ".-", color=COLORS[run["arm"]], label=LABELS[run["arm"]])
    axes.set(xlabel="layer", ylabel="cosine, a tenth of the run and its end")
    axes.legend(frameon=False)
    return figure


def side_by_side(plain: Mapping[str, Any], ours: Mapping[str, Any]) -> Figure:
    """Draw the losses of two runs, and by how much one lies below the other.

    Args:
        plain: Result of the run without ProRes.
        ours: Result of the run with it.
    """
    figure, (left, right) = _figure(2)
    for result in (plain, ours):
        color, label = COLORS[result["arm"]], LABELS[result["arm"]]
        steps, values = result["curves"]["training loss"]
        left.plot(steps, ema(values, _WEIGHT), color=color, label=label)
        steps, values = result["curves"]["validation loss"]
        left.plot(steps, values, "o", color=color, markersize=5, label=f"{label}, validation")
    # Where the curves part: the first third of training is the same steep fall.
    late = [v for r in (plain, ours) for v in r["curves"]["training loss"][1]]
    late = late[len(late) // 6 : len(late) // 2] + late[-len(late) // 3 :]
    left.set(xlabel="iteration", ylabel="loss (nats per token)", ylim=(min(late), max(late)))
    left.legend(frameon=False)
    (steps, base), (_, values) = (r["curves"]["training loss"] for r in (plain, ours))
    if len(base) == len(values):
        difference = np.array(values) - np.array(base)
        right.plot(steps, difference, color=COLORS[PRORES], linewidth=0.6, alpha=0.3)
        right.plot(steps, ema(difference, _WEIGHT), color=COLORS[PRORES])
    right.axhline(0.0, color="0.5", linewidth=0.8)
    right.set(xlabel="iteration", ylabel="loss with ProRes minus loss without")
    right.set_ylim(-0.2, 0.2)
    figure.suptitle(f"Post-LN, {plain['layers']} layers: plain Megatron, and with ProRes")
    return figure


def mean_curve(
    results: Results, placement: str, layers: int, arm: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """Return iterations and the training loss, the mean over seeds; None without runs."""
    found = results.of(placement=placement, layers=layers, arm=arm)
    curves = [result["curves"]["training loss"] for result in found]
    curves = [curve for curve in curves if curve[0] == curves[0][0]]
    if not curves:
        return None
    return np.array(curves[0][0]), np.mean([curve[1] for curve in curves], axis=0)


PICTURES: dict[str, Callable[[Any], Any]] = {
    "losses": losses,
    "depth": depth,
    "gap": gap,
    "growth": growth,
    "cosine": cosine,
}
