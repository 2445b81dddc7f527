"""One picture of the study: what the early steps lose."""

from __future__ import annotations

import os
from pathlib import Path

from studies.fp8.report import Document, groups, mean, steps_of, title

_DRAWN = """
    delayed delayed-margin1 delayed-e4m3 delayed-max1024-e4m3 tensorwise blockwise mxfp8
    mxfp8-hybrid
""".split()
"""The others lie on one of these."""

_PANELS = {
    "lost": "micro-batch gradients lost altogether",
    "first_saturated": "saturated elements, first micro-batch",
    "error": "relative L2 error of the gradients",
}


def draw(document: Document, path: Path) -> None:
    """Draw a row of panels for each placement and schedule, as a .png."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    found = groups(document)
    size = (3.6 * len(_PANELS), 1.9 * len(found) + 0.9)
    figure, axes = plt.subplots(len(found), len(_PANELS), figsize=size, squeeze=False)
    for panels, (group, recipes) in zip(axes, found.items(), strict=True):
        panels[0].set_ylabel(title(*group), fontsize=9)
        for panel, column in zip(panels, _PANELS, strict=True):
            for number, name in enumerate(_DRAWN):
                runs = recipes.get(name, [])
                means = {step: mean(runs, column, step=step) for step in steps_of(runs)}
                points = [(step, 100 * part) for step, part in means.items() if part is not None]
                if points:
                    style = {"label": name, "color": f"C{number}", "linewidth": 1.3}
                    panel.plot(*zip(*points, strict=True), marker=".", **style)
            panel.set_yscale("log" if column == "error" else "linear")
            panel.yaxis.set_major_formatter("{x:g} %")
            panel.tick_params(labelsize=7)
            panel.grid(alpha=0.3)
    for panel, words in zip(axes[0], _PANELS.values(), strict=True):
        panel.set_title(words, fontsize=9)
    for panel in axes[-1]:
        panel.set_xlabel("step t", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=8, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.3 / size[1], 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
