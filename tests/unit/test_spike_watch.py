"""The running watch over spikes finds what the score of a whole curve finds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_prores.measure import spike_watch
from megatron_prores.measure.spike_watch import Curve, StepSkipper
from megatron_prores.runs.spikes import FEWEST, WINDOW, spike_score, spikes
from megatron_prores.upstream.training_loop import StepFigures

STEPS = 2500


def noisy_curve() -> list[float]:
    """Makes a curve longer than two windows, with spikes and two values that are no numbers."""
    values = np.random.default_rng(1).normal(3.0, 0.1, STEPS)
    values[[100, 700, 1200, 2200, 2450]] = 9.0
    values[[800, 1900]] = math.nan, math.inf
    return [float(value) for value in values]


def test_steps_taken_one_by_one_give_the_spikes_and_the_score_of_the_curve() -> None:
    values, curve = noisy_curve(), Curve()
    found = [curve.add(iteration, value) for iteration, value in enumerate(values, start=1)]
    assert found == list(spikes(values))
    assert sum(found) == 7
    assert curve.score() == 7 / STEPS
    assert curve.final(STEPS) == (5, 2000)  # those of step 100 and 2450 are outside of the span
    assert spike_score(values) == 5 / 2000
    assert len(curve.latest) == WINDOW


def test_a_resumed_run_scores_the_iterations_that_it_saw() -> None:
    curve = Curve()
    for iteration in range(81, 101):
        curve.add(iteration, 1.0)
    assert curve.final(100) == (0, 10)


def test_what_is_too_large_follows_the_window_and_what_was_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(spike_watch, "_say", said.append)
    monkeypatch.setattr(
        spike_watch, "get_args", lambda: type("Args", (), {"log_interval": 10**6})()
    )
    skipper = StepSkipper(3.0)

    def take(iteration: int, norm: float | None) -> bool:
        """Takes a step, skipped as the optimizer skips it; returns whether it was too large."""
        too_large = norm is not None and skipper.is_too_large(norm)
        skipper.after_step(StepFigures(iteration, {}, norm, norm is None or too_large))
        return too_large

    assert not skipper.is_too_large(1e9)  # too few steps before it to say
    # 1, 3, 1, 3, ...: mean 2 and deviation 1.
    assert not any(take(iteration, 1.0 + 2 * (iteration % 2)) for iteration in range(1, FEWEST + 1))
    assert skipper.is_too_large(5.1)
    assert not skipper.is_too_large(4.9)
    assert not take(21, None)  # not finite: skipped by Megatron itself, no part of the window
    assert skipper.skipped == 0
    assert not said
    assert take(22, 100.0)
    assert skipper.skipped == 1
    assert said[0].startswith("skipped: iteration 22, grad-norm 100 is ")
    assert not take(23, 60.0)  # what was skipped widens the window, as in the score
