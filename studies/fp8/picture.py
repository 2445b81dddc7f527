"""One picture of the study: what the early steps lose, and what it does to the loss."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_prores.config import OFF
from studies.fp8.recipes import BF16
from studies.fp8.report import Document, Run, figures, groups, lost_part, steps_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 9
"""Steps over which the losses are averaged."""

_DRAWN = (
    "delayed",
    "delayed-margin1",
    "delayed-e4m3",
    "delayed-max1024-e4m3",
    "tensorwise",
    "blockwise",
    "mxfp8",
    "mxfp8-hybrid",
)
"""The others lie on one of these."""

_PANELS = {
    "lost": "micro-batch gradients lost altogether",
    "first_saturated": "saturated elements, first micro-batch",
    "error": "relative L2 error of the gradients",
    "loss": f"loss minus that of bf16, mean of {SMOOTHING} steps",
}


def draw(document: Document, path: Path) -> None:
    """Draw a row of panels for each placement and schedule.

    Args:
        document: What the study found.
        path: Of the picture, a .png.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    found = groups(document)
    is_long = len(document["runs"][0]["loss"]) >= 4 * SMOOTHING
    panels = {kind: title for kind, title in _PANELS.items() if is_long or kind != "loss"}
    size = (3.6 * len(panels), 1.9 * len(found) + 0.9)
    figure, axes = plt.subplots(len(found), len(panels), figsize=size, squeeze=False)
    for row, ((placement, schedule), recipes) in enumerate(found.items()):
        for column, (kind, title) in enumerate(panels.items()):
            panel = axes[row][column]
            for number, name in enumerate(_DRAWN):
                if name in recipes:
                    _draw_line(panel, kind, recipes[name], recipes[BF16], name, number)
            if row == 0:
                panel.set_title(title, fontsize=9)
            if row == len(found) - 1:
                panel.set_xlabel("step t", fontsize=8)
            panel.tick_params(labelsize=7)
            panel.grid(alpha=0.3)
        name = "no ProRes" if schedule == OFF else Path(schedule).stem
        axes[row][0].set_ylabel(f"{placement}, {name}", fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=8, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.3 / size[1], 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_line(
    panel: Axes, kind: str, runs: list[Run], base: list[Run], name: str, number: int
) -> None:
    style: dict[str, Any] = {"label": name, "color": f"C{number}", "linewidth": 1.3}
    if kind == "loss":
        pairs = zip(runs, base, strict=True)
        gap = np.mean([np.subtract(run["loss"], other["loss"]) for run, other in pairs], axis=0)
        smooth = np.convolve(gap, np.ones(SMOOTHING) / SMOOTHING, mode="valid")
        panel.plot(np.arange(len(smooth)) + SMOOTHING // 2, smooth, **style)
        return
    steps, values = [], []
    for step in steps_of(runs):
        if kind == "lost":
            value = lost_part(runs, step)
        else:
            found = figures(runs, kind, step)
            value = statistics.fmean(found) if found else None
        if value is not None:
            steps.append(step)
            values.append(100 * value)
    panel.plot(steps, values, marker=".", **style)
    if kind == "error":
        panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g} %")
