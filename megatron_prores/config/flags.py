"""What the command line calls the arguments of :class:`ProResConfig`.

Below this file everything speaks of arguments, as the public names do.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_prores.config.prores_config import ProResConfig
from megatron_prores.errors import Argument, ArgumentError, UserError

FLAGS = {
    "schedule": "--prores-schedule",
    "schedule_sha256": "the sha256 of the schedule's file",
    "warmup_iters": "--prores-warmup-iters",
    "warmup_iters_per_layer": "--prores-warmup-iters-per-layer",
    "warmup_samples": "--prores-warmup-samples",
    "norm_placement": "--norm-placement",
    "branch_init": "--branch-init",
    "truncated_init": "--init-method-truncated-normal",
    "embedding_weight_decay": "--embedding-weight-decay",
    "num_layers": "--num-layers",
    "hybrid_layer_pattern": "--hybrid-layer-pattern",
    "spec": "the layers that these flags select",
}
"""Argument, or setting of a checkpoint -> the flag that it comes from."""


def config_of(args: argparse.Namespace) -> ProResConfig:
    """Build the configuration from parsed flags, or from those that a checkpoint remembers.

    Args:
        args: Has the destinations of the flags of the group "ProRes".

    Raises:
        ArgumentError: A value is wrong.
    """
    return ProResConfig(
        schedule=args.prores_schedule,
        warmup_iters=args.prores_warmup_iters,
        warmup_iters_per_layer=args.prores_warmup_iters_per_layer,
        warmup_samples=args.prores_warmup_samples,
        norm_placement=args.norm_placement,
        branch_init=args.branch_init,
        # Not in a checkpoint that is older than the flag.
        truncated_init=getattr(args, "init_method_truncated_normal", False),
        embedding_weight_decay=args.embedding_weight_decay,
    )


@contextmanager
def told_in_flags() -> Iterator[None]:
    """Raise an :class:`ArgumentError` of the block as a :class:`UserError` in words of flags."""
    try:
        yield
    except ArgumentError as error:
        raise UserError(error.message(as_flag)) from error


def as_flag(argument: Argument) -> str:
    """Write an argument as the flag that it comes from, with its value where it has one."""
    flag = FLAGS.get(argument.name, argument.name)
    return flag if argument.value is None else f"{flag} {argument.value}"
