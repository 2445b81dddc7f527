"""Turns on the measurements that the flags ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from megatron_prores.measure.layer_norms import LayerNormsLog
from megatron_prores.measure.spike_watch import SpikeLog, StepSkipper, end_without_a_number
from megatron_prores.measure.throughput import ThroughputLog
from megatron_prores.upstream.optimizer import skip_updates
from megatron_prores.upstream.registry import undo
from megatron_prores.upstream.training_loop import (
    call_after_steps,
    call_after_training,
    call_around_train_step,
    call_with_throughput,
)

_PURPOSES: tuple[Callable[..., Any], ...] = (
    LayerNormsLog.around_step,
    StepSkipper.is_too_large,
    StepSkipper.after_step,
    SpikeLog.after_step,
    SpikeLog.at_the_end,
    ThroughputLog.after_log,
    end_without_a_number,
)


def install(args: argparse.Namespace) -> None:
    """Install the measurements of a run, and take back those of another.

    Args:
        args: Megatron's validated arguments, with the group ProRes. Without its flags nothing of
            Megatron is replaced here.
    """
    for purpose in _PURPOSES:
        undo(purpose)
    if interval := args.log_layer_norms_interval:
        norms = LayerNormsLog(interval, args.num_layers, args.hidden_size)
        call_around_train_step(norms.around_step)
    if sigmas := args.skip_step_above_sigmas:
        skipper = StepSkipper(sigmas)
        skip_updates(skipper.is_too_large)
        call_after_steps(skipper.after_step)
    if args.log_spikes:
        log = SpikeLog()
        call_after_steps(log.after_step)
        call_after_training(log.at_the_end)
    if args.log_throughput:
        call_with_throughput(ThroughputLog().after_log)
    # With a dynamic loss scale such steps are left out; else nothing of Megatron's would stop it.
    if not args.check_for_nan_in_loss_and_grad and not args.fp16:
        call_after_steps(end_without_a_number)
