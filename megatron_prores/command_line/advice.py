"""What a run can do and its user hardly wants: warnings, told before it starts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from megatron_prores.command_line.document_masks import position_advice
from megatron_prores.command_line.effects import effect_warnings
from megatron_prores.command_line.fp8 import fp8_advice
from megatron_prores.config.prores_config import ProResConfig
from megatron_prores.schedule.depth import depths_of
from megatron_prores.schedule.timeline import Timeline, timeline_of


def advice(
    args: argparse.Namespace,
    prores: ProResConfig,
    *,
    argv: Sequence[str] = (),
    seconds_per_step: float | None = None,
    time_limit: float | None = None,
) -> list[str]:
    """List what is worth a second look before a job is submitted.

    Args:
        args: Validated by Megatron.
        prores: The run's ProRes configuration.
        argv: The command line that was parsed: what the user gave, before validation changed it.
        seconds_per_step: What a step takes, where that is known.
        time_limit: Seconds that the job may run.

    Returns:
        One sentence each, with the flags to change; empty where there is nothing to say.
    """
    lines = [*effect_warnings(argv), *position_advice(args)]
    if args.skip_train:
        return lines
    timeline = timeline_of(args)
    return [
        *lines,
        *_warmup(args, prores, timeline),
        *_evaluation(args, prores, timeline),
        *_batch_sizes(args, timeline),
        *_saving(args, timeline, seconds_per_step, time_limit),
        *fp8_advice(args, prores),
    ]


def _warmup(args: argparse.Namespace, prores: ProResConfig, timeline: Timeline) -> list[str]:
    if not prores.enabled:
        return []
    openings = timeline.steps_at(prores.opening_steps(depths_of(args)[-1]), prores.unit)
    late = [layer for layer, step in enumerate(openings, 1) if step and step > timeline.steps]
    if not late:
        return []
    last = max(step for step in openings if step is not None)
    which = f"layer {late[0]}" if len(late) == 1 else f"{len(late)} of {len(openings)} layers"
    flag = "--prores-warmup-" + ("iters" if prores.unit == "iterations" else "samples")
    return [
        f"the warmup is longer than the training: {which} never open{'s' * (len(late) == 1)} "
        f"fully; the last opens after step {last} of {timeline.steps}: shorten {flag}, or train "
        "longer"
    ]


def _evaluation(args: argparse.Namespace, prores: ProResConfig, timeline: Timeline) -> list[str]:
    if not (prores.enabled and args.eval_interval and args.eval_iters):
        return []
    openings = [
        step
        for step in timeline.steps_at(prores.opening_steps(depths_of(args)[-1]), prores.unit)
        if step
    ]
    first = min(openings, default=0)
    early = min(first - 1, timeline.steps) // args.eval_interval
    if early < 1:
        return []
    which = (
        f"the evaluation after step {args.eval_interval} comes"
        if early == 1
        else f"{early} evaluations, from step {args.eval_interval} on, come"
    )
    return [
        f"{which} before any layer is fully open (the first opens after step {first}): their "
        "losses are those of a model that is still closed in part"
    ]


def _batch_sizes(args: argparse.Namespace, timeline: Timeline) -> list[str]:
    """Find batch sizes at which Megatron stops, at the first step or in the middle of training."""
    warnings = []
    parts = args.micro_batch_size * args.data_parallel_size
    for phase in timeline.phases:
        if phase.first_step >= timeline.steps:
            break
        micro, odd = divmod(phase.batch_size, parts)
        if odd:
            warnings.append(
                f"--step-batch-size-schedule: from step {phase.first_step} on the batch is "
                f"{phase.batch_size}, which does not divide by micro batch {args.micro_batch_size} "
                f"times {args.data_parallel_size} data-parallel ranks: the run stops there"
            )
        elif args.virtual_pipeline_model_parallel_size is not None:
            ranks = args.pipeline_model_parallel_size
            group = getattr(args, "microbatch_group_size_per_vp_stage", None) or ranks
            if 0 < micro % group < ranks:
                warnings.append(
                    f"from step {phase.first_step} on a step has {micro} micro-batches, which do "
                    f"not divide by the {group} that virtual stages take in a row: the run stops "
                    f"there; change --global-batch-size {phase.batch_size} or --micro-batch-size "
                    f"{args.micro_batch_size}"
                )
    return warnings


def _saving(
    args: argparse.Namespace,
    timeline: Timeline,
    seconds_per_step: float | None,
    time_limit: float | None,
) -> list[str]:
    if time_limit is None:
        return []
    if args.exit_duration_in_mins and args.exit_duration_in_mins * 60 < time_limit:
        return []  # Megatron ends the run there itself, and saves.
    if args.save is None:
        return ["the job has a time limit and no --save: what it does not finish is lost"]
    if seconds_per_step is None or args.save_interval is None:
        return []
    reached = math.floor(time_limit / seconds_per_step)
    if reached >= timeline.steps or args.save_interval <= reached:
        return []
    return [
        f"--save-interval {args.save_interval} lies past the time limit: at {seconds_per_step:g} s "
        f"a step the job ends after about {reached} steps, without a checkpoint unless a signal "
        f"warns it: save every {max(1, reached // 4)} steps or so"
    ]
