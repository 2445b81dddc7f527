"""What is noted of the gradients that enter the linear layers, step by step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from studies.fp8.formats import Loss, Quantized

LINEARS = ("qkv", "proj", "fc1", "fc2")
"""The four linear layers of a transformer layer, in the order of its forward pass."""

COLUMNS = (
    "step", "layer", "linear", "micro_batches", "lost", "amax", "scale",
    "first_saturated", "first_flushed", "first_error",
    "saturated", "flushed", "error", "weight_gradient_error",
)  # fmt: skip
"""Of a row of :meth:`Recorder.rows`.

- ``lost``: micro-batches of which no element of the gradient was left, because all were flushed or
  because zeros alone arrived.
- ``amax``: the largest magnitude of the gradient in the step.
- ``scale``: the largest one of the first micro-batch, None without FP8.
- ``saturated``, ``flushed``: fractions of the gradient's elements that are not zero, over all
  micro-batches of the step; ``error``: relative L2 error of the gradient. Both as the GEMM of the
  input's gradient sees it; None where the whole gradient is zero.
- ``first_*``: the same of the first micro-batch alone.
- ``weight_gradient_error``: as ``error``, in the GEMM of the weight's gradient.
"""


class Recorder:
    """Keeps what became of the gradients in the steps asked for."""

    def __init__(self, steps: Iterable[int]) -> None:
        """Take the steps to keep, as completed iterations: the first step is 0."""
        self.steps = frozenset(steps)
        self.step = 0
        self._uses: dict[tuple[int, int, int], list[tuple[Loss, Loss]]] = {}

    def begin(self, step: int) -> None:
        """Say which step the gradients belong to from now on."""
        self.step = step

    def add(self, layer: int, linear: str, rows: Quantized, columns: Quantized) -> None:
        """Note a gradient of the current step; micro-batches come in their order.

        Args:
            layer: 1..L.
            linear: One of :data:`LINEARS`.
            rows: As the GEMM of the input's gradient sees it.
            columns: As the GEMM of the weight's gradient sees it.
        """
        if self.step in self.steps:
            key = self.step, layer, LINEARS.index(linear)
            self._uses.setdefault(key, []).append((rows.loss(), columns.loss()))

    def rows(self) -> list[list[Any]]:
        """Return a row of :data:`COLUMNS` for each step, layer and linear, rounded."""
        rows = []
        for (step, layer, linear), uses in sorted(self._uses.items()):
            losses, weight_losses = zip(*uses, strict=True)
            first = losses[:1]
            figures = [
                max(loss.amax for loss in losses),
                first[0].scale,
                _fraction(first, "saturated"),
                _fraction(first, "flushed"),
                _relative_error(first),
                _fraction(losses, "saturated"),
                _fraction(losses, "flushed"),
                _relative_error(losses),
                _relative_error(weight_losses),
            ]
            lost = sum(loss.nonzero == loss.flushed for loss in losses)
            rounded = [None if figure is None else float(f"{figure:.3g}") for figure in figures]
            rows.append([step, layer, LINEARS[linear], len(uses), lost, *rounded])
        return rows


def _fraction(losses: tuple[Loss, ...], kind: str) -> float | None:
    nonzero = sum(loss.nonzero for loss in losses)
    return sum(getattr(loss, kind) for loss in losses) / nonzero if nonzero else None


def _relative_error(losses: tuple[Loss, ...]) -> float | None:
    norm = sum(loss.squared_norm for loss in losses)
    return math.sqrt(sum(loss.squared_error for loss in losses) / norm) if norm else None
