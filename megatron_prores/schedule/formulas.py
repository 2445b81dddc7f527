"""The ProRes schedules: alpha(l, t), the scalar on the residual branches of layer l at step t.

Plain mathematics on numpy arrays: no torch, no Megatron. Notation of the paper ("Progressive
Residual Warmup for Language Model Pretraining", Chen et al., arXiv 2603.05369, section 3):

- l: layer, 1-based over the whole model, of L layers (``num_layers``);
- t: optimizer updates completed (``step``); the first training step runs with t = 0;
- W: length of the whole warmup in iterations (``warmup``), T = W / L the part of one layer.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Alphas = NDArray[np.float64]


@dataclass(frozen=True)
class _Progress:
    """What a formula reads. Arrays have shape [L]; layers count from 1."""

    layer: Alphas
    num_layers: int
    step: float
    warmup: float

    def ramp(self, start: Alphas | float, length: Alphas | float) -> Alphas:
        """0 until ``start``, 1 from ``start + length`` on; both in units of T = W / L iterations.

        Multiplies by L instead of dividing W by it: t and W are whole numbers, so that the ramp is
        exactly 1 at its last step, not a rounding error below it.
        """
        done = (self.step * self.num_layers - self.warmup * start) / (self.warmup * length)
        return np.clip(done, 0.0, 1.0)


def _linear(p: _Progress) -> Alphas:
    return p.ramp(0.0, p.layer)


def _climb(p: _Progress, floor: Alphas | float) -> Alphas:
    """Layer l waits at ``floor`` and climbs from it to 1 during steps T(l-1)..Tl."""
    done = p.ramp(p.layer - 1.0, 1.0)
    # Written from the top down, so that the end of the climb is exactly 1; before it, floor itself.
    climb = np.maximum(1.0 - (1.0 - floor) * (1.0 - done), floor)
    return np.where(done > 0.0, climb, floor)


def _constant(p: _Progress, value: Alphas | float) -> Alphas:
    return value * np.ones(p.num_layers)


_FORMULAS: dict[str, Callable[[_Progress], Alphas]] = {
    "linear": _linear,
    "linear_sqrt": lambda p: np.sqrt(_linear(p)),
    "linear_square": lambda p: np.square(_linear(p)),
    "equal": lambda p: p.ramp(0.0, p.num_layers * np.ones(p.num_layers)),
    "reverse": lambda p: p.ramp(0.0, p.num_layers + 1.0 - p.layer),
    "stagewise_0": lambda p: _climb(p, 0.0),
    "stagewise_L": lambda p: _climb(p, 1.0 / p.num_layers),
    "stagewise_sqrt_L": lambda p: _climb(p, 1.0 / math.sqrt(p.num_layers)),
    "stagewise_sqrt_l": lambda p: _climb(p, 1.0 / np.sqrt(p.layer)),
    "fix_L": lambda p: _constant(p, 1.0 / p.num_layers),
    "fix_sqrt_L": lambda p: _constant(p, 1.0 / math.sqrt(p.num_layers)),
    "fix_sqrt_l": lambda p: _constant(p, 1.0 / np.sqrt(p.layer)),
}

SCHEDULES: tuple[str, ...] = tuple(_FORMULAS)
"""Names of the schedules, as in the paper's ablation (section 4)."""


def alphas(schedule: str, step: float, num_layers: int, warmup: float) -> Alphas:
    """Evaluate a schedule for every layer of the model at one step.

    Args:
        schedule: One of :data:`SCHEDULES`.
        step: t, the optimizer updates completed (iterations), not negative.
        num_layers: L, the layers of the whole model, at least 1.
        warmup: W, the length of the whole warmup (iterations), more than 0. The ``fix_*``
            schedules do not depend on it.

    Returns:
        alpha(1..L, t), float64 array of shape [L], each within [0, 1].

    Raises:
        ValueError: The schedule is unknown, or a number is out of its range.
    """
    if schedule not in _FORMULAS:
        raise ValueError(f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if num_layers < 1 or num_layers != int(num_layers):
        raise ValueError(f"num_layers must be a whole number from 1 on, got {num_layers}")
    if not (math.isfinite(step) and step >= 0):
        raise ValueError(f"step must be a number from 0 on, got {step}")
    if not (math.isfinite(warmup) and warmup > 0):
        raise ValueError(f"warmup must be a number of iterations above 0, got {warmup}")
    layer = np.arange(1, num_layers + 1, dtype=np.float64)
    return _FORMULAS[schedule](_Progress(layer, int(num_layers), float(step), float(warmup)))


def opening_steps(schedule: str, num_layers: int, warmup: int) -> list[int | None]:
    """Find for every layer the first step at which its alpha is 1, from which on it stays 1.

    Args:
        schedule: One of :data:`SCHEDULES`.
        num_layers: L, the layers of the whole model.
        warmup: W, the length of the whole warmup (iterations).

    Returns:
        For layer 1..L the step (iterations), or None where the layer never opens fully (``fix_*``).

    Raises:
        ValueError: As :func:`alphas`.
    """
    # Every schedule grows with t and is done at W.
    return find_opening_steps(
        lambda step: alphas(schedule, step, num_layers, warmup), [0, math.ceil(warmup)]
    )


def find_opening_steps(evaluate: Callable[[int], Alphas], steps: Sequence[int]) -> list[int | None]:
    """Find for every layer the first step from which on its alpha stays 1, by bisection.

    A search over whole steps needs no second form of the schedule that could disagree with the
    first.

    Args:
        evaluate: Gives alpha(1..L, step), shape [L].
        steps: Where to look first, strictly rising, from step 0 on. Between two neighbours alpha
            of a layer must not both reach 1 and leave it, and after the last one not move.

    Returns:
        For layer 1..L the step (iterations), or None where alpha is not 1 at the last of ``steps``.
    """
    is_open = np.array([evaluate(step) == 1.0 for step in steps])
    found: list[int | None] = []
    for layer in range(is_open.shape[1]):
        closed = np.flatnonzero(~is_open[:, layer])
        if not closed.size:
            found.append(steps[0])
        elif closed[-1] == len(steps) - 1:
            found.append(None)
        else:
            low, high = steps[closed[-1]], steps[closed[-1] + 1]
            # The key is called with the step, as a range's items are their indices.
            found.append(
                bisect_left(
                    range(high),
                    True,
                    lo=low + 1,
                    key=lambda step: bool(evaluate(step)[layer] == 1.0),
                )
            )
    return found
