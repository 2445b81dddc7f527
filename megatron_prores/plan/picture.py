"""A plan as a picture: who opens when, stage by stage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_prores.plan.result import Plan
from megatron_prores.runs.plot import save_figure, size_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELLED = 48
"""Rows with a label of their own; of more, every second or third has one."""


def draw_plan(plan: Plan, path: Path) -> None:
    """Draw alpha over steps for every layer, and write the picture, whole or not at all.

    Steps go to the right, layers down by pipeline stage and virtual stage; alpha is the color.

    Args:
        plan: The plan; its ``curves`` hold the alphas.
        path: A ``.png``.

    Raises:
        UserError: It cannot be written.
    """
    # Figure itself, not pyplot: no window system, no global state, nothing to close.
    from matplotlib.figure import Figure

    chunks = [chunk for chunk in plan.stages if chunk["layers"]]
    rows = [layer for chunk in chunks for layer in chunk["layers"]]
    height = min(14.0, max(3.6, 1.7 + 0.17 * len(rows)))
    figure = Figure(figsize=(9, height), layout="constrained", facecolor="white")
    axes = figure.subplots()
    steps = np.array(plan.curves["steps"], dtype=np.float64)
    alphas = np.array(plan.curves["alphas"])[:, [layer - 1 for layer in rows]].T
    edges = np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1.0))
    image = axes.pcolormesh(
        edges, np.arange(len(rows) + 1), alphas, cmap="viridis", vmin=0, vmax=1, rasterized=True
    )
    axes.invert_yaxis()
    for row, layer in enumerate(rows):
        if opens := plan.layers[layer - 1]["opens_after_step"]:
            axes.plot(opens, row + 0.5, "o", color="white", markeredgecolor="0.2", markersize=3.5)
    _label_rows(axes, plan, chunks)
    end = plan.training["steps"]
    if end < edges[-1]:
        axes.axvline(end, color="#d1495b", linewidth=1.5)
    axes.set_xlim(0, edges[-1])
    when = "at first" if len(plan.training["batch_phases"]) > 1 else "each"
    tokens = f"{plan.training['tokens_per_step']:,} tokens {when}"
    axes.set_xlabel(f"step ({tokens}); training ends after step {end:,}")
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    title = (
        f"{plan.model['layers']} layers, {size_of(plan.parameters['total'])} parameters; "
        f"{plan.fits[0]}; schedule {plan.warmup['schedule']}"
    )
    axes.set_title(title, fontsize=10, loc="left", pad=18)
    figure.colorbar(
        image, ax=axes, label="residual scale α", pad=0.015, ticks=[0, 0.5, 1], aspect=30
    )
    save_figure(figure, path, "--picture")


def _label_rows(axes: Axes, plan: Plan, chunks: list[dict[str, Any]]) -> None:
    """Name stages and layers on the left, and draw lines between the stages."""
    labels: list[str] = []
    stage = chunks[0]["stage"]
    for chunk in chunks:
        if labels:
            width = 0.5 if chunk["stage"] == stage else 1.6
            axes.axhline(len(labels), color="white", linewidth=width)
        stage = chunk["stage"]
        name = f"stage {stage}"
        if plan.layout["virtual"] > 1:
            name += f", virtual {chunk['virtual_stage']}"
        first, *others = chunk["layers"]
        labels += [f"{name}, layer {first}", *map(str, others)]
    stride = math.ceil(len(labels) / _LABELLED)
    shown = [
        row for row, label in enumerate(labels) if row % stride == 0 or label.startswith("stage")
    ]
    axes.set_yticks([row + 0.5 for row in shown], [labels[row] for row in shown], fontsize=7)
    axes.tick_params(axis="y", length=2)
