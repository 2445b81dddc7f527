"""A plan as a picture: who opens when, stage by stage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_prores.plan.result import Plan
from megatron_prores.plot import _save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELLED = 48
"""Rows with a label of their own; of more, every second or third has one."""

_FEW = 4
"""Layers of a chunk up to which one label names them all."""


def draw_plan(plan: Plan) -> Figure:
    """Draw alpha over steps for every layer, layers side by side with those of their stage.

    Args:
        plan: The plan; its ``curves`` hold the alphas.

    Returns:
        The figure: steps to the right, layers down by pipeline stage and virtual
        stage, alpha as colour.
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
    _mark_openings(axes, plan, rows)
    _label_rows(axes, plan, chunks)
    _mark_end(axes, plan.training["steps"], edges[-1])
    axes.set_xlim(0, edges[-1])
    when = "at first" if len(plan.training["batch_phases"]) > 1 else "each"
    axes.set_xlabel(f"step ({plan.training['tokens_per_step']:,} tokens {when})")
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    axes.set_title(_title(plan), fontsize=10, loc="left", pad=18)
    figure.colorbar(
        image, ax=axes, label="residual scale α", pad=0.015, ticks=[0, 0.5, 1], aspect=30
    )
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write the picture, whole or not at all.

    Raises:
        UserError: It cannot be written.
    """
    _save(figure, path, "--picture")


def _mark_openings(axes: Axes, plan: Plan, rows: list[int]) -> None:
    """Put a dot where a layer is fully open."""
    opens = {layer.layer: layer.opens_after_step for layer in plan.layers}
    points = [(opens[layer], row + 0.5) for row, layer in enumerate(rows) if opens[layer]]
    if points:
        axes.plot(
            *zip(*points, strict=True), "o", color="white", markeredgecolor="0.2", markersize=3.5
        )


def _label_rows(axes: Axes, plan: Plan, chunks: list[dict[str, Any]]) -> None:
    """Name stages and layers on the left, and draw lines between the stages."""
    starts = np.cumsum([0] + [len(chunk["layers"]) for chunk in chunks])
    virtual = plan.layout["virtual"] > 1
    for start, before, chunk in zip(starts[1:-1], chunks, chunks[1:], strict=False):
        is_stage = before["stage"] != chunk["stage"]
        axes.axhline(start, color="white", linewidth=1.6 if is_stage else 0.5)
    many = max(len(chunk["layers"]) for chunk in chunks) > _FEW
    labels: dict[float, str] = {}
    for start, chunk in zip(starts, chunks, strict=False):
        layers = chunk["layers"]
        name = f"stage {chunk['stage']}" + (
            f", virtual {chunk['virtual_stage']}" if virtual else ""
        )
        if many:
            labels |= {start + at + 0.5: f"{layer}" for at, layer in enumerate(layers)}
            labels[start + 0.5] = f"{name}, layer {layers[0]}"
        else:
            labels[start + len(layers) / 2] = f"{name}, {layer_span(layers)}"
    stride = math.ceil(len(labels) / _LABELLED)
    shown = [
        (at, label)
        for index, (at, label) in enumerate(labels.items())
        if index % stride == 0 or label.startswith("stage")
    ]
    axes.set_yticks([at for at, _ in shown], [label for _, label in shown], fontsize=7)
    axes.tick_params(axis="y", length=2)


def layer_span(layers: list[int]) -> str:
    """Write the layers of a chunk in short."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    return f"layers {layers[0]}-{layers[-1]}"


def _mark_end(axes: Axes, end: int, right: float) -> None:
    """Say where the training ends, in the picture or beyond it."""
    inside = end < right
    if end == right:
        return
    if inside:
        axes.axvline(end, color="#d1495b", linewidth=1.5)
    axes.annotate(
        "training ends here" if inside else f"training goes on to step {end:,}",
        (end if inside else right, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="#d1495b" if inside else "0.4",
        annotation_clip=False,
    )


def _title(plan: Plan) -> str:
    layout = plan.layout
    parts = [f"{layout['tensor']} tensor", f"{layout['pipeline']} pipeline"]
    if layout["virtual"] > 1:
        parts[-1] += f" ({layout['virtual']} virtual stages)"
    if layout["context"] > 1:
        parts.append(f"{layout['context']} context")
    parts.append(f"{layout['data']} data")
    total = plan.parameters["total"]
    size = f"{total / 1e9:.2f}B" if total >= 1e9 else f"{total / 1e6:.1f}M"
    return (
        f"{plan.model['layers']} layers, {size} parameters on {plan.world_size} "
        f"GPU{'s' * (plan.world_size > 1)}: {' x '.join(parts)}; schedule "
        f"{plan.warmup['schedule']}"
    )
