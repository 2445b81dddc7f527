"""Turns on the measurements that the flags ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from megatron_prores.measure.layer_norms import LayerNormsLog
from megatron_prores.measure.spike_watch import SpikeLog, StepSkipper
from megatron_prores.upstream.optimizer import skip_updates
from megatron_prores.upstream.registry import undo
from megatron_prores.upstream.training_loop import (
    call_after_steps,
    call_after_training,
    call_around_train_step,
)

_PURPOSES: tuple[Callable[..., Any], ...] = (
    LayerNormsLog.around_step,
    StepSkipper.is_too_large,
    StepSkipper.after_step,
    SpikeLog.after_step,
    SpikeLog.at_the_end,
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
