"""Steps, samples and tokens of a run: how long it is, and where in it each layer opens."""

from __future__ import annotations

import argparse
from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one batch size."""

    first_step: int
    """Steps completed before it."""
    first_sample: int
    """Samples consumed before it."""
    batch_size: int
    """Samples (sequences) per step."""


@dataclass(frozen=True)
class Timeline:
    """How a run's steps turn into samples and tokens, also while its batch grows."""

    phases: tuple[Phase, ...]
    steps: int
    """Steps of the whole run (iterations)."""
    seq_length: int

    @property
    def samples(self) -> int:
        """Sample of the whole run."""
        return self.samples_at(self.steps)

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.samples * self.seq_length

    def samples_at(self, step: int) -> int:
        """Return the samples consumed when ``step`` steps are completed."""
        steps = [phase.first_step for phase in self.phases]
        phase = self.phases[bisect_right(steps, step) - 1]
        return phase.first_sample + (step - phase.first_step) * phase.batch_size

    def step_at(self, samples: int) -> int:
        """Return the first number of completed steps with at least that many samples consumed."""
        starts = [phase.first_sample for phase in self.phases]
        phase = self.phases[bisect_right(starts, samples) - 1]
        return phase.first_step + -(-(samples - phase.first_sample) // phase.batch_size)

    def tokens_at(self, step: int) -> int:
        """Return the tokens seen when ``step`` steps are completed."""
        return self.samples_at(step) * self.seq_length

    def steps_at(self, openings: list[int | None], unit: str) -> list[int | None]:
        """Return the completed steps at which layers open, whatever their schedule counts.

        Args:
            openings: For layer 1..L where it opens, None for never, as
                ``ProResConfig.opening_steps`` returns it.
            unit: What ``openings`` counts: "iterations" or "samples".
        """
        if unit == "iterations":
            return openings
        return [None if samples is None else self.step_at(samples) for samples in openings]


def timeline_of(args: argparse.Namespace) -> Timeline:
    """Read the timeline of a run from its arguments and Megatron's batch size calculator.

    Args:
        args: Validated by Megatron, whose batch size calculator is set up.
    """
    from megatron.core import num_microbatches_calculator as upstream

    calculator = upstream._GLOBAL_NUM_MICROBATCHES_CALCULATOR
    if args.step_batch_size_schedule is None:
        batch = calculator.get_current_running_global_batch_size()
        phases = [Phase(0, 0, batch)]
        # As upstream's update_train_iters.
        steps = args.train_iters or (args.train_samples or 0) // args.global_batch_size
        return Timeline(tuple(phases), steps, args.seq_length)
    phases = []
    for threshold, batch in calculator.schedule:
        if not phases:
            phases.append(Phase(0, 0, batch))
            continue
        before = phases[-1]
        needed = -(-(threshold - before.first_sample) // before.batch_size)
        if needed <= 0:
            # One large step went past the whole of this phase.
            phases.pop()
            needed = 0
        phases.append(
            Phase(
                before.first_step + needed,
                before.first_sample + needed * before.batch_size,
                batch,
            )
        )
    timeline = Timeline(tuple(phases), args.train_iters or 0, args.seq_length)
    if args.train_iters:
        return timeline
    return Timeline(timeline.phases, timeline.step_at(args.train_samples or 0), args.seq_length)
