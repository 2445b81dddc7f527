"""What is noted of the gradients that enter the linear layers, step by step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from studies.fp8.formats import Loss

LINEARS = ("qkv", "proj", "fc1", "fc2")
"""The four linear layers of a transformer layer, in the order of its forward pass."""

COLUMNS = (
    "step", "layer", "linear", "micro_batches", "lost", "amax", "scale",
    "first_saturated", "first_flushed", "first_error",
    "saturated", "flushed", "subnormal", "error", "weight_gradient_error",
)  # fmt: skip
"""Of a row of :meth:`Recorder.rows`.

- ``lost``: micro-batches of which no element of the gradient was left, because all were flushed or
  because zeros alone arrived.
- ``amax``: the largest magnitude of the gradient in the step.
- ``scale``: the largest one of the first micro-batch, None where the recipe's scales are unknown.
- ``saturated``, ``flushed``, ``subnormal``: fractions of the gradient's elements that are not zero,
  over all micro-batches of the step; ``error``: relative L2 error of the gradient. Both as the GEMM
  of the input's gradient sees it; None where the whole gradient is zero.
- ``first_*``: the same of the first micro-batch alone.
- ``weight_gradient_error``: as ``error``, in the GEMM of the weight's gradient.
"""


@dataclass(frozen=True)
class Use:
    """The gradient of one micro-batch, quantized."""

    amax: float
    scale: float | None
    loss: Loss
    """Along the rows, for the gradient of the input."""
    weight_loss: Loss
    """Along the columns, for the gradient of the weight."""


class Recorder:
    """Takes down every use, and keeps those of the steps asked for."""

    def __init__(self, steps: Iterable[int]) -> None:
        """Take the steps to keep, as completed iterations: the first step is 0."""
        self.steps = frozenset(steps)
        self.step = 0
        self._uses: dict[tuple[int, int, str], list[Use]] = {}

    def begin(self, step: int) -> None:
        """Say which step the uses belong to from now on."""
        self.step = step

    @property
    def wanted(self) -> bool:
        """Whether this step is kept."""
        return self.step in self.steps

    def add(self, layer: int, linear: str, use: Use) -> None:
        """Take down a use of the current step; micro-batches come in their order."""
        self._uses.setdefault((self.step, layer, linear), []).append(use)

    def rows(self) -> list[list[Any]]:
        """Return a row of :data:`COLUMNS` for each step, layer and linear, rounded."""
        rows = []
        for (step, layer, linear), uses in sorted(
            self._uses.items(), key=lambda item: (*item[0][:2], LINEARS.index(item[0][2]))
        ):
            losses, first = [use.loss for use in uses], [uses[0].loss]
            figures = [
                max(use.amax for use in uses),
                uses[0].scale,
                fraction(first, "saturated"),
                fraction(first, "flushed"),
                relative_error(first),
                fraction(losses, "saturated"),
                fraction(losses, "flushed"),
                fraction(losses, "subnormal"),
                relative_error(losses),
                relative_error([use.weight_loss for use in uses]),
            ]
            lost = sum(loss.nonzero == loss.flushed for loss in losses)
            rows.append([step, layer, linear, len(uses), lost, *map(_rounded, figures)])
        return rows


def fraction(losses: list[Loss], kind: str) -> float | None:
    """Return the part of the elements that are not zero to which ``kind`` happened."""
    nonzero = sum(loss.nonzero for loss in losses)
    return sum(getattr(loss, kind) for loss in losses) / nonzero if nonzero else None


def relative_error(losses: list[Loss]) -> float | None:
    """Return the relative L2 error of tensors taken together."""
    norm = sum(loss.squared_norm for loss in losses)
    return math.sqrt(sum(loss.squared_error for loss in losses) / norm) if norm else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")
