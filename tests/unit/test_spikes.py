"""The spike score on made series whose spikes are counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_prores.runs.spikes import FEWEST, spike_score, spikes

# 1, 3, 1, 3, ...: mean 2 and deviation 1 over every even number of them.
CALM = np.tile([1.0, 3.0], 50)


def test_a_spike_is_seven_deviations_away_on_either_side() -> None:
    for value, is_one in ((8.9, False), (9.0, True), (-4.9, False), (-5.0, True)):
        curve = CALM.copy()
        curve[60] = value
        assert list(np.flatnonzero(spikes(curve, window=20))) == ([60] if is_one else []), value


def test_a_spike_hides_what_follows_within_the_window() -> None:
    curve = CALM.copy()
    curve[[40, 42, 70]] = 50.0
    # At 42 the window holds the spike of 40: 50 lies 4.3 deviations of 10.5 from its mean.
    assert list(np.flatnonzero(spikes(curve, window=20))) == [40, 70]
    assert list(np.flatnonzero(spikes(curve, window=20, sigmas=4.0))) == [40, 42, 70]


def test_what_is_no_number_is_a_spike_and_hides_nothing() -> None:
    curve = CALM.copy()
    curve[[40, 41]] = np.nan, np.inf
    assert list(np.flatnonzero(spikes(curve, window=30))) == [40, 41]
    curve[42] = 50.0
    assert list(np.flatnonzero(spikes(curve, window=30))) == [40, 41, 42]


def test_the_first_steps_are_not_judged() -> None:
    curve = np.array([1.0, 3.0] * (FEWEST // 2) + [100.0])
    assert not spikes(curve[1:]).any()
    assert list(np.flatnonzero(spikes(curve))) == [FEWEST]


def test_a_constant_curve_has_no_spike_until_it_moves() -> None:
    curve = np.ones(50)
    assert not spikes(curve).any()
    curve[30] = 1.1
    assert list(np.flatnonzero(spikes(curve))) == [30]


def test_the_score_is_the_share_of_the_middle_of_training() -> None:
    curve = CALM.copy()
    curve[[25, 60, 95]] = 50.0  # the last one lies behind 90% of training
    assert spike_score(curve, window=20) == pytest.approx(2 / 80)
    assert spike_score(curve, window=20, span=(0.0, 1.0)) == pytest.approx(3 / 100)
    assert np.isnan(spike_score([]))
