"""FP8 choices that docs/fp8.md has measured to harm: told before a run, never refused."""

from __future__ import annotations

import argparse

from megatron_prores.config.prores_config import ProResConfig

LONG_HISTORY = 40
"""Micro-batches. The figures follow a restart for this long, so that a history which is not shorter
has the very same ones."""


def fp8_advice(args: argparse.Namespace, prores: ProResConfig) -> list[str]:
    """List the FP8 choices of a run that cost its gradients precision for nothing.

    Args:
        args: Megatron's parsed arguments.
        prores: The run's ProRes configuration.

    Returns:
        One line each, with the flags to change; empty where there is nothing to say.
    """
    if args.fp8 is None:
        return []
    return [*_blocks(args), *_restart(args, prores)]


def _blocks(args: argparse.Namespace) -> list[str]:
    if args.fp8_recipe not in ("blockwise", "mxfp8") or args.fp8 != "hybrid":
        return []
    return [
        f"--fp8-format hybrid with --fp8-recipe {args.fp8_recipe} doubles the error of every "
        "gradient and saves none from underflow, as each block has a scale of its own: use "
        "--fp8-format e4m3 (docs/fp8.md)"
    ]


def _restart(args: argparse.Namespace, prores: ProResConfig) -> list[str]:
    if (
        not (prores.enabled and args.prores_restart)
        or (args.fp8, args.fp8_recipe, args.fp8_amax_compute_algo) != ("e4m3", "delayed", "max")
        or args.fp8_amax_history_len < LONG_HISTORY
    ):
        return []
    return [
        "--prores-restart with --fp8-recipe delayed --fp8-format e4m3: alpha falls from 1 to "
        "almost nothing, but gradients keep the scale that they had before for "
        f"--fp8-amax-history-len {args.fp8_amax_history_len} micro-batches, and up to a quarter of "
        "their elements becomes 0: use --fp8-recipe tensorwise or --fp8-format hybrid (docs/fp8.md)"
    ]
