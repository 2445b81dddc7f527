"""Spikes of a run as they come: a line in the log, the score, and updates that are left out.

A resumed run begins with an empty window: nothing is judged by the steps of the process before it.
"""

from __future__ import annotations

import math
from collections import deque
from datetime import datetime

import numpy as np
import numpy.typing as npt
import torch
from megatron.training import get_args
from megatron.training.utils import print_rank_last

from megatron_prores.errors import StopRun
from megatron_prores.runs.logged import GRAD_NORM_TAG, TRAIN_TAG
from megatron_prores.runs.spikes import FEWEST, WINDOW, is_spike
from megatron_prores.upstream.training_loop import StepFigures
from megatron_prores.warmup.scalars import log_scalars

SCORED_SPAN = (0.1, 0.9)
"""The part of training that the score at the end is over: the paper's (Figure 2)."""


class Curve:
    """The latest values of a curve, one a step, and which of all its steps were spikes."""

    def __init__(self) -> None:
        """Begin without any."""
        self.latest: deque[float] = deque(maxlen=WINDOW)
        self.found: dict[int, bool] = {}
        """Iteration -> whether it was a spike."""

    @property
    def before(self) -> npt.NDArray[np.float64]:
        """What the next step is compared with: the finite values of the window."""
        values = np.array(self.latest, dtype=np.float64)
        return values[np.isfinite(values)]

    def add(self, iteration: int, value: float) -> bool:
        """Take the value of the next step; return whether it is a spike."""
        self.found[iteration] = is_spike(value, self.before)
        self.latest.append(value)
        return self.found[iteration]

    def score(self) -> float:
        """Compute the share of the steps so far that are spikes."""
        return float(np.mean([*self.found.values()]))

    def final(self, train_iters: int) -> tuple[int, int]:
        """Count the spikes, and the steps, from 10% to 90% of training."""
        first, last = (round(part * train_iters) for part in SCORED_SPAN)
        found = [spike for iteration, spike in self.found.items() if first < iteration <= last]
        return sum(found), len(found)


class SpikeLog:
    """Says when the loss or the gradient norm stands out, and how often (``--log-spikes``)."""

    def __init__(self) -> None:
        """Begin without any steps."""
        self.curves = {TRAIN_TAG: Curve(), GRAD_NORM_TAG: Curve()}

    def after_step(self, step: StepFigures) -> None:
        """Look at a step; on the last rank, which has the loss and Megatron's log."""
        if not _is_last_rank():
            return
        # Reading the loss waits for the device, as Megatron's own TensorBoard logging does.
        values = {
            TRAIN_TAG: float(step.losses[TRAIN_TAG]),
            GRAD_NORM_TAG: math.nan if step.grad_norm is None else step.grad_norm,
        }
        for name, value in values.items():
            curve = self.curves[name]
            before = curve.before
            if curve.add(step.iteration, value):
                how_far = _how_far(value, before)
                _say(f"spike: iteration {step.iteration}, {name} {value:.4g} {how_far}")
        if step.iteration % get_args().log_interval == 0:
            scores = {f"prores/spike_score/{n}": c.score() for n, c in self.curves.items()}
            log_scalars(scores, step.iteration)

    def at_the_end(self) -> None:
        """Say both scores of the run."""
        if not _is_last_rank():
            return
        whole = get_args().train_iters
        for name, curve in self.curves.items():
            spikes, steps = curve.final(whole)
            score = f"{spikes / steps:.4g}, {spikes} of {steps} steps" if steps else "no steps"
            _say(f"spike score: {name} {score} between 10% and 90% of {whole} iterations")


class StepSkipper:
    """Leaves out updates whose gradient norm stands out (``--skip-step-above-sigmas``).

    Every rank decides for itself, by the same norm of the whole gradient. Megatron's log counts the
    step among the skipped iterations, as one whose gradient is not finite.
    """

    def __init__(self, sigmas: float) -> None:
        """Take S, the standard deviations above the mean."""
        self.sigmas = sigmas
        self.curve = Curve()
        self.skipped = 0

    def is_too_large(self, norm: float) -> bool:
        """Whether the step of this gradient norm is to be left out."""
        before = self.curve.before
        return len(before) >= FEWEST and norm > float(before.mean() + self.sigmas * before.std())

    def after_step(self, step: StepFigures) -> None:
        """Take the gradient norm of a step among those that the next is judged by."""
        norm = math.nan if step.grad_norm is None else step.grad_norm
        if step.skipped and self.is_too_large(norm):
            self.skipped += 1
            _say(
                f"skipped: iteration {step.iteration}, {GRAD_NORM_TAG} {norm:.4g} "
                f"{_how_far(norm, self.curve.before)}, more than {self.sigmas:g} "
                f"(--skip-step-above-sigmas); {self.skipped} skipped so far"
            )
        self.curve.add(step.iteration, norm)
        if step.iteration % get_args().log_interval == 0:
            log_scalars({"prores/skipped_steps": float(self.skipped)}, step.iteration)


def end_without_a_number(step: StepFigures) -> None:
    """End a run that does not check for NaN (``--no-check-for-nan-in-loss-and-grad``) at the first.

    The gradient norm, which Megatron reads to clip by, costs nothing to look at. It is of all
    ranks, so that all end. With ``--clip-grad 0`` there is none.

    Raises:
        StopRun: It is NaN or infinite: so are the weights now, but no checkpoint has them.
    """
    if step.grad_norm is not None and not math.isfinite(step.grad_norm):
        raise StopRun(
            f"NaN in the loss or the gradients of iteration {step.iteration}: the gradient norm is "
            f"{step.grad_norm}; what was saved before is not touched by it"
        )


def _how_far(value: float, before: npt.NDArray[np.float64]) -> str:
    if not math.isfinite(value):
        return "is no finite number"
    sigmas = abs(value - before.mean()) / max(before.std(), np.finfo(np.float64).tiny)
    side = "above" if value > before.mean() else "below"
    return (
        f"is {sigmas:.3g} standard deviations {side} the mean {before.mean():.4g} of the "
        f"{len(before)} steps before"
    )


def _is_last_rank() -> bool:
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def _say(line: str) -> None:
    print_rank_last(f" [{datetime.now():%Y-%m-%d %H:%M:%S}] {line}")
