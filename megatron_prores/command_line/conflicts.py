"""Flags that exclude each other, or what this machine has, refused before any work."""

from __future__ import annotations

from typing import Any

from megatron_prores.command_line.document_masks import check_document_mask
from megatron_prores.command_line.hybrid import NOT_WITH_HYBRID, check_pattern
from megatron_prores.command_line.never import FAILS_IN_MEGATRON, NEVER
from megatron_prores.command_line.precision import check_fp8_hardware, check_graphs
from megatron_prores.command_line.resiliency import check_resiliency
from megatron_prores.command_line.rules import (
    NEEDS_PACKAGE,
    NOT_WITH_DEEPNORM_INIT,
    NOT_WITH_LAYER_NORMS,
    NOT_WITH_NORM_BEHIND_THE_SUM,
    NOT_WITH_OWN_INIT,
    NOT_WITH_OWN_LAYER,
    NOT_WITH_OWN_NORMS,
    NOT_WITH_RESCALED_INIT,
    ONLY_WITH_TRANSFORMER_ENGINE,
    Rule,
)
from megatron_prores.command_line.values import check_numbers, check_training
from megatron_prores.config.placement import PLACEMENTS
from megatron_prores.config.prores_config import OFF, ProResConfig
from megatron_prores.errors import UserError
from megatron_prores.system.environment import THIS_MACHINE, TargetEnvironment


def check_flags(args: Any, prores: ProResConfig, target: TargetEnvironment = THIS_MACHINE) -> None:
    """Refuse flags that cannot work together with ProRes, on this device, or in this program.

    Args:
        args: Parsed, not yet validated by Megatron.
        prores: The ProRes configuration of the same command line.
        target: The machine of the run.

    Raises:
        UserError: Names the flag, and why.
    """
    _refuse(args, (*NEVER, *FAILS_IN_MEGATRON), "cannot be used with pretrain_gpt_prores.py")
    check_layers(args, prores)
    _check_placement_and_init(args, prores)
    check_numbers(args)
    check_training(args)
    _check_async_save(args)
    _check_measurements(args)
    check_resiliency(args, target)
    check_document_mask(args)
    if args.device == "cpu":
        from megatron_prores.command_line.cpu import NOT_ON_CPU

        _refuse(args, NOT_ON_CPU, "cannot be used with --device cpu")
    if args.transformer_impl == "local":
        _refuse(args, ONLY_WITH_TRANSFORMER_ENGINE, "cannot be used with --transformer-impl local")
    check_packages(args, target)
    check_graphs(args)
    check_fp8_hardware(args, target)


def check_layers(args: Any, prores: ProResConfig) -> None:
    """Refuse layers that this project has no counterpart of.

    Args:
        args: Parsed; once more when ``--use-checkpoint-args`` has taken some from a checkpoint.
        prores: The ProRes configuration of the same command line.

    Raises:
        UserError: Names the flag, and why.
    """
    if args.hybrid_layer_pattern is not None:
        _refuse(args, NOT_WITH_HYBRID, "cannot be used with --hybrid-layer-pattern")
        check_pattern(args, prores)
    if prores.needs_own_layer:
        verdict = (
            f"cannot be used with --prores-schedule other than {OFF}"
            if prores.enabled
            else f"cannot be used with --norm-placement {prores.norm_placement}"
        )
        _refuse(args, NOT_WITH_OWN_LAYER, verdict)


def check_packages(args: Any, target: TargetEnvironment) -> None:
    """Refuse flags that need a package which the target machine does not have.

    Args:
        args: Parsed, not yet validated by Megatron.
        target: The machine of the run.

    Raises:
        UserError: Names the flag, the package, and what to do without it.
    """
    for flag, is_given, module, package, instead in NEEDS_PACKAGE:
        if is_given(args) and not target.is_installed(module):
            given = flag.format(**vars(args))
            raise UserError(f"{given} needs {package}, which is not installed: {instead}")


def _check_async_save(args: Any) -> None:
    if not args.async_save:
        return
    if not args.use_persistent_ckpt_worker:
        # Upstream saves synchronously, and says so in one line among many.
        raise UserError("--async-save needs --use-persistent-ckpt-worker: give both")


def _check_measurements(args: Any) -> None:
    if args.peak_tflops is not None and not args.log_throughput:
        raise UserError("--peak-tflops needs --log-throughput: MFU is a part of it")
    if args.log_layer_norms_interval is None:
        return
    if args.tensorboard_dir is None and not args.wandb_project:
        raise UserError(
            "--log-layer-norms-interval needs --tensorboard-dir or --wandb-project: they are "
            "written nowhere else"
        )
    _refuse(args, NOT_WITH_LAYER_NORMS, "cannot be used with --log-layer-norms-interval")


def _check_placement_and_init(args: Any, prores: ProResConfig) -> None:
    placement, initialization = PLACEMENTS[prores.norm_placement], prores.initialization
    named = f"--norm-placement {prores.norm_placement}"
    if placement.post_norm:
        _refuse(args, NOT_WITH_NORM_BEHIND_THE_SUM, f"cannot be used with {named}")
    if not placement.is_stock:
        _refuse(args, NOT_WITH_OWN_NORMS, f"cannot be used with {named}")
    if prores.branch_init != "auto" or placement.deepnorm:
        _refuse(args, NOT_WITH_OWN_INIT, f"cannot be used with --branch-init {initialization}")
    if prores.truncated_init:
        _refuse(args, NOT_WITH_OWN_INIT, "cannot be used with --init-method-truncated-normal")
    rescaled = initialization in ("ds", "deepnorm")
    if rescaled:
        _refuse(args, NOT_WITH_RESCALED_INIT, f"cannot be used with --branch-init {initialization}")
    if initialization == "deepnorm":
        _refuse(args, NOT_WITH_DEEPNORM_INIT, "cannot be used with --branch-init deepnorm")
    if (placement.scaled_norms or rescaled) and args.init_model_with_meta_device:
        raise UserError(
            f"--init-model-with-meta-device cannot be used with {named} and "
            f"--branch-init {prores.branch_init}: there are no weights yet to set"
        )


def _refuse(args: Any, rules: tuple[Rule, ...], verdict: str) -> None:
    for flag, is_given, reason in rules:
        if is_given(args):
            raise UserError(f"{flag} {verdict}: {reason}")
