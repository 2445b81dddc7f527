"""What cannot work, refused before any work: flags that exclude each other, absent files."""

from __future__ import annotations

import os
from typing import Any

from megatron_prores.config import OFF, ProResConfig
from megatron_prores.data.dataset_files import check_dataset, data_prefixes
from megatron_prores.data.megatron_tokenizer import check_tokenizer_arguments
from megatron_prores.environment import is_installed
from megatron_prores.errors import UserError
from megatron_prores.flags.arguments import prores_config
from megatron_prores.flags.document_masks import check_document_mask
from megatron_prores.flags.limits import check_numbers, check_split, check_training
from megatron_prores.flags.never import FAILS_IN_MEGATRON, NEVER
from megatron_prores.flags.precision import check_fp8_hardware, check_graphs
from megatron_prores.flags.preflight import check_checkpoint_is_there, check_directories
from megatron_prores.flags.resiliency import check_resiliency
from megatron_prores.flags.rules import (
    NOT_WITH_DEEPNORM_INIT,
    NOT_WITH_NORM_BEHIND_THE_SUM,
    NOT_WITH_OWN_INIT,
    NOT_WITH_OWN_LAYER,
    NOT_WITH_OWN_NORMS,
    ONLY_WITH_TRANSFORMER_ENGINE,
    Rule,
)
from megatron_prores.placement import PLACEMENTS


def check_flags(args: Any) -> None:
    """Refuses flags that cannot work together with ProRes, on this device, or in this program.

    Args:
        args: Parsed, not yet validated by Megatron.

    Raises:
        UserError: Names the flag, and why.
    """
    prores = prores_config(args)
    _refuse(args, (*NEVER, *FAILS_IN_MEGATRON), "cannot be used with pretrain_gpt_prores.py")
    check_layers(args)
    _check_placement_and_init(args, prores)
    check_numbers(args)
    check_training(args)
    _check_async_save(args)
    check_resiliency(args)
    check_document_mask(args)
    if args.device == "cpu":
        from megatron_prores.cpu.flags import NOT_ON_CPU

        _refuse(args, NOT_ON_CPU, "cannot be used with --device cpu")
    elif args.transformer_impl == "transformer_engine" and not is_installed("transformer_engine"):
        raise UserError(
            "--transformer-impl transformer_engine (the default) needs Transformer Engine, which "
            "is not installed: install megatron-prores[te], or use --transformer-impl local"
        )
    if args.transformer_impl == "local":
        _refuse(args, ONLY_WITH_TRANSFORMER_ENGINE, "cannot be used with --transformer-impl local")
    if args.device == "cuda" and args.gradient_accumulation_fusion:
        _check_gradient_accumulation_fusion()
    check_graphs(args)
    check_fp8_hardware(args)


def check_layers(args: Any) -> None:
    """Refuse layers that this project has no counterpart of.

    Args:
        args: Parsed; once more when ``--use-checkpoint-args`` has taken some from a checkpoint.

    Raises:
        UserError: Names the flag, and why.
    """
    prores = prores_config(args)
    if args.hybrid_layer_pattern is not None:
        raise UserError(
            "--hybrid-layer-pattern cannot be used with pretrain_gpt_prores.py: hybrid models are "
            "not supported yet"
        )
    if prores.needs_own_layer:
        verdict = (
            f"cannot be used with --prores-schedule other than {OFF}"
            if prores.enabled
            else f"cannot be used with --norm-placement {prores.norm_placement}"
        )
        _refuse(args, NOT_WITH_OWN_LAYER, verdict)


def _check_gradient_accumulation_fusion() -> None:
    # Also with Transformer Engine: the output head is Megatron's own linear, which ends the run
    # when the model is built.
    if not is_installed("fused_weight_gradient_mlp_cuda"):
        raise UserError(
            "gradient accumulation fusion (Megatron's default) needs Apex's "
            "fused_weight_gradient_mlp_cuda, which is not installed: give "
            "--no-gradient-accumulation-fusion"
        )


def _check_async_save(args: Any) -> None:
    if not args.async_save:
        return
    if not args.use_persistent_ckpt_worker:
        # Upstream saves synchronously, and says so in one line among many.
        raise UserError("--async-save needs --use-persistent-ckpt-worker: give both")


def _check_placement_and_init(args: Any, prores: ProResConfig) -> None:
    placement, initialization = PLACEMENTS[prores.norm_placement], prores.initialization
    named = f"--norm-placement {prores.norm_placement}"
    if placement.norm_sum:
        _refuse(args, NOT_WITH_NORM_BEHIND_THE_SUM, f"cannot be used with {named}")
    if not placement.is_stock:
        _refuse(args, NOT_WITH_OWN_NORMS, f"cannot be used with {named}")
    if prores.branch_init != "auto" or placement.deepnorm:
        _refuse(args, NOT_WITH_OWN_INIT, f"cannot be used with --branch-init {initialization}")
    if initialization == "deepnorm":
        _refuse(args, NOT_WITH_DEEPNORM_INIT, "cannot be used with --branch-init deepnorm")
    if (placement.scaled_norms or initialization == "deepnorm") and (
        args.init_model_with_meta_device
    ):
        raise UserError(
            f"--init-model-with-meta-device cannot be used with {named} and "
            f"--branch-init {prores.branch_init}: there are no weights yet to set"
        )


def _refuse(args: Any, rules: tuple[Rule, ...], verdict: str) -> None:
    for flag, is_given, reason in rules:
        if is_given(args):
            raise UserError(f"{flag} {verdict}: {reason}")


def check_files(args: Any) -> None:
    """Refuses a run whose data, tokenizer, checkpoint or output directories cannot be used.

    Args:
        args: Parsed, not yet validated by Megatron.

    Raises:
        UserError: Names the flag and the file.
    """
    check_directories(args)
    check_checkpoint_is_there(args)
    layers = args.heterogeneous_layers_config_path
    if layers is not None and not os.path.isfile(layers):
        raise UserError(f"--heterogeneous-layers-config-path {layers}: no such file")
    if args.tokenizer_type is None:
        raise UserError("--tokenizer-type is missing: give the one that the data was made with")
    check_tokenizer_arguments(args)
    if args.mock_data:
        return
    prefixes = data_prefixes(args)
    if not prefixes:
        raise UserError(
            "no data to train on: give --data-path PREFIX, --train-data-path and "
            "--valid-data-path, or --mock-data"
        )
    check_split(args)
    for flag, prefix in dict.fromkeys(prefixes):
        check_dataset(flag, prefix)
