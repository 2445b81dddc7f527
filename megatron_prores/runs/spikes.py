"""Spikes of a curve: steps that stand out from what came before them (paper, Figure 2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

WINDOW = 1000
"""Steps that a step is compared with: the paper's."""

SIGMAS = 7.0
"""Standard deviations from their mean that make a spike: the paper's."""

FEWEST = 20
"""Steps before one that it can be judged by; of fewer the deviation says too little."""


def spikes(
    values: npt.ArrayLike, window: int = WINDOW, sigmas: float = SIGMAS
) -> npt.NDArray[np.bool_]:
    """Find the steps that lie at least ``sigmas`` standard deviations from the steps before them.

    Args:
        values: Loss or gradient norm of each step, in order. What is no number is a spike, and is
            not counted among the steps before others.
        window: How many of the steps before are looked at, at least :data:`FEWEST`; fewer where
            there are fewer.
        sigmas: Standard deviations (of the population) from their mean.

    Returns:
        Whether each step is a spike; False for the first :data:`FEWEST`, which nothing can judge.
    """
    curve = np.asarray(values, dtype=np.float64)
    found = np.zeros(len(curve), dtype=np.bool_)
    for step in range(len(curve)):
        before = curve[max(0, step - window) : step]
        found[step] = is_spike(curve[step], before[np.isfinite(before)], sigmas)
    return found


def is_spike(value: float, before: npt.NDArray[Any], sigmas: float = SIGMAS) -> bool:
    """Whether a value stands out from those before it; False where they are too few to say."""
    if len(before) < FEWEST:
        return False
    return not abs(value - before.mean()) < max(sigmas * before.std(), np.finfo(np.float64).tiny)


def spike_score(
    values: npt.ArrayLike,
    window: int = WINDOW,
    sigmas: float = SIGMAS,
    span: tuple[float, float] = (0.1, 0.9),
) -> float:
    """Compute the spike score: the share of steps that are spikes.

    Args:
        values: As in :func:`spikes`, of a whole run.
        window: As there.
        sigmas: As there.
        span: The part of training that is looked at; the paper's is 10% to 90%.

    Returns:
        From 0 to 1; NaN where the span holds no step.
    """
    found = spikes(values, window, sigmas)
    first, last = (round(part * len(found)) for part in span)
    return float(found[first:last].mean()) if last > first else float("nan")
